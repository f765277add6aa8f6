"""Results as something that a person would rather look at than read: Markdown and plots, from the JSON files alone."""
