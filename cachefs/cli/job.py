"""`cachefs job`: what the master is doing in the background, and `cachefs replicate`."""

from __future__ import annotations

import json
import time

import click

from cachefs.cli import params
from cachefs.cli.connect import master_option, run_with_client
from cachefs.cli.following import about, background_option, facts_of, how_far, print_job, run_job
from cachefs.cli.tables import print_tables, table_of
from cachefs.client import Client
from cachefs.net import Address
from cachefs.wire.control import CancelJob, GetJob, JobSpec, ListJobs


@click.group()
def job() -> None:
    """Jobs of the master: `load`, `replicate`, `free --everywhere`, `worker drain`. They go on when it is restarted."""


@job.command("list")
@master_option
@params.json_option
def list_(master_address: Address | None, as_json: bool) -> None:
    """List the jobs that run, and the last hundred that ended."""

    async def run(client: Client) -> None:
        jobs = (await client.ask(ListJobs())).jobs
        if as_json:
            print(json.dumps([facts_of(each) for each in jobs]))
            return
        rows = [
            (str(each.job_id), each.spec.kind, about(each.spec), each.state, how_far(each), _age(each.created_ns))
            for each in jobs
        ]
        print_tables(table_of(("id", "kind", "of", "state", "how far", "begun"), rows))

    run_with_client(master_address, run)


def _age(created_ns: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(created_ns / 1e9))


@job.command()
@click.argument("job_id", metavar="ID", type=int)
@master_option
@params.json_option
def show(job_id: int, master_address: Address | None, as_json: bool) -> None:
    """Show how far a job is, and what of it failed: how many, and the first hundred with their reasons."""

    async def run(client: Client) -> None:
        info = await client.ask(GetJob(job_id))
        if as_json:
            print(json.dumps(facts_of(info)))
        else:
            print_job(info)

    run_with_client(master_address, run)


@job.command()
@click.argument("job_id", metavar="ID", type=int)
@master_option
@params.json_option
def cancel(job_id: int, master_address: Address | None, as_json: bool) -> None:
    """End a job. What it has done stays done; a worker that was being drained takes blocks again."""

    async def run(client: Client) -> None:
        info = await client.ask(CancelJob(job_id))
        if as_json:
            print(json.dumps(facts_of(info)))
        else:
            print_job(info)

    run_with_client(master_address, run, admin=True)


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--replicas", type=click.IntRange(1, 1000), required=True, help="Copies, each on another worker.")
@click.option("--limit", type=params.RATE, default="0", help="Bytes a second over the cluster, such as 200M; 0 = none.")
@background_option
@click.option("--dry-run", is_flag=True, help="Only say what would be copied.")
@master_option
@params.json_option
def replicate(
    paths: tuple[str, ...],
    replicas: int,
    limit: int,
    background: bool,
    dry_run: bool,
    master_address: Address | None,
    as_json: bool,
) -> None:
    """Have so many workers hold files, and everything below directories.

    What is cached nowhere is loaded. A job of the master, as `cachefs load --replicas`. Copies beyond the first are
    given up first when a worker needs room; what is pinned is not.
    """
    spec = JobSpec("load", params.all_absolute(paths), replicas=replicas, limit_bytes_per_s=limit)
    run_job(master_address, spec, dry_run=dry_run, background=background, as_json=as_json)
