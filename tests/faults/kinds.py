"""The faults: each starts a run, harms it at a random moment, starts it again and says what became of it.

A fault passes if the run that was started again ends with exactly the weights of the run that nothing happened to, or if it refuses to go on and names the cause, and then, with the cause
removed, ends with those weights.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator

from tests.faults.jobs import SAVE_EVERY, STEPS, Job, JobFailed, NotInjected, base_config, final_digest, parent_of
from tests.helpers.warm_launcher import WarmLauncher

__all__ = ['KINDS', 'Campaign', 'Failed', 'Fault', 'Outcome', 'Skipped']

_SIGNALS = {signal.SIGKILL: 'kill -9', signal.SIGTERM: 'SIGTERM', signal.SIGINT: 'SIGINT', signal.SIGSTOP: 'SIGSTOP'}


class Failed(Exception):
    """The fault was survived wrongly: other weights, no cause, leftovers."""


class Skipped(Exception):
    """This machine cannot produce the fault."""


@dataclass(frozen=True)
class Reference:
    """A run that nothing happened to: what it ended with, and the time from its command to its first step."""

    digest: str
    start_s: float


@dataclass
class Campaign:
    """What all faults share: a folder, data, and the runs that nothing happened to, by form of checkpoint and number of processes."""

    folder: Path
    data: Path
    rng: random.Random
    launcher: WarmLauncher | None = None
    references: dict[tuple[bool, int], Reference] = field(default_factory=dict)

    def job(self, folder: Path, config: dict[str, Any], ranks: int = 2, environment: dict[str, str] | None = None) -> Job:
        return Job(folder, config, ranks, environment, self.launcher)

    def reference(self, sharded: bool = False, ranks: int = 2) -> Reference:
        """Trained when it is first needed.

        Raises:
            JobFailed: it ended badly or left something behind.
        """
        if (sharded, ranks) not in self.references:
            job = self.job(self.folder / f'reference-{"sharded" if sharded else "whole"}-{ranks}', base_config(self.data, sharded), ranks)
            begin = time.monotonic()
            job.start()
            job.wait_for_step(0)
            started = time.monotonic()
            if job.wait() != 0:
                raise JobFailed(f'the reference run failed: {job.output[-2000:]}')
            if left := job.leftovers():
                raise JobFailed(f'the reference run left behind: {", ".join(left)}')
            self.references[sharded, ranks] = Reference(final_digest(Path(job.config['save_folder']), sharded), started - begin)
        return self.references[sharded, ranks]


@dataclass
class Outcome:
    """One row of the table."""

    fault: str
    moment: str = ''
    exit_code: int | None = None
    cause: str = ''
    result: str = ''
    notes: list[str] = field(default_factory=list)


@dataclass
class Fault:
    """A kind of fault, to be produced ``times`` times."""

    name: str
    produce: Callable[[Campaign, Path], Outcome]
    times: int = 1


def cause_of(output: str) -> str:
    """The line of the output that says what happened: the class of the summary, else our error block, else the last exception."""
    for pattern in (r'^class: +(.+)$', r'^ERROR[^\n]*: (\w+[^\n]*\n[^\n]+)', r'^(\w*(?:Error|Exception): [^\n]+)$'):
        found = re.findall(pattern, output, re.MULTILINE)
        if found:
            return ' '.join(found[0].split())[:160]
    return ''


def check_final(campaign: Campaign, job: Job, sharded: bool = False, folder: Path | None = None) -> None:
    """Raises Failed unless the run's last checkpoint is the reference's, to the bit, and nothing is left behind."""
    if final_digest(folder or Path(job.config['save_folder']), sharded) != campaign.reference(sharded, job.ranks).digest:
        raise Failed('the final weights differ from those of the run that nothing happened to')
    left = job.leftovers()
    if left:
        raise Failed(f'left behind: {", ".join(left)}')


def kill(job: Job, outcome: Outcome, step: int | None = None) -> None:
    """SIGKILL to every process of a job that runs, when it has reached ``step``.

    Raises:
        NotInjected: it ended first.
    """
    if step is not None:
        job.wait_for_step(step)
    job.kill_everything()
    outcome.exit_code, outcome.cause = job.wait(), '(nobody is left to name it)'
    if outcome.exit_code == 0:
        raise NotInjected('the run ended before it was killed')


def resume(job: Job, outcome: Outcome) -> None:
    """Starts the command again, which must end well."""
    job.start()
    code = job.wait()
    if code != 0:
        raise Failed(f'the resumed run ended with {code}: {cause_of(job.output) or job.output[-600:]}')
    outcome.result += 'bit-identical'


def goes_on(campaign: Campaign, job: Job, outcome: Outcome, sharded: bool = False) -> Outcome:
    """The resumed run ends well and with the right weights."""
    resume(job, outcome)
    check_final(campaign, job, sharded)
    return outcome


def refuse(job: Job, outcome: Outcome, cause: str) -> None:
    """Starts the command again, which must refuse and name the cause."""
    job.start()
    code = job.wait()
    if code == 0 or not re.search(cause, job.output):
        raise Failed(f'a run that should have been refused ended with {code} and did not name {cause!r}: {job.output[-600:]}')
    outcome.cause = cause_of(job.output)
    outcome.result = 'refused with its cause; mended: '


def _random_step(campaign: Campaign, first: int = 1, last: int = STEPS - 4) -> int:
    return campaign.rng.randint(first, last)


def _after_death(job: Job, outcome: Outcome) -> None:
    outcome.exit_code = job.wait()
    outcome.cause = cause_of(job.output)
    if outcome.exit_code == 0:
        raise Failed('the run ended with 0 although it was harmed')


def signalled(who: str, number: signal.Signals, sharded: bool = False, ranks: int = 2) -> Callable[[Campaign, Path], Outcome]:
    """A signal to a rank, the launcher or everything, at a random step; ``SIGSTOP`` stalls instead of killing."""

    def produce(campaign: Campaign, folder: Path) -> Outcome:
        job = campaign.job(folder, base_config(campaign.data, sharded), ranks)
        step = _random_step(campaign)
        outcome = Outcome(f'{_SIGNALS[number]} of {who}', f'step {step}')
        job.start()
        job.wait_for_step(0)
        target = job.rank_pid(int(who[-1])) if who.startswith('rank') else job.pid
        job.wait_for_step(step)
        (os.killpg if who == 'all processes' else os.kill)(target, number)
        _after_death(job, outcome)
        return goes_on(campaign, job, outcome, sharded)

    return produce


def killed_while_starting(campaign: Campaign, folder: Path) -> Outcome:
    """All processes, somewhere between the start of the command and the first steps."""
    job = campaign.job(folder, base_config(campaign.data))
    seconds = campaign.rng.uniform(0, 1.2) * campaign.reference().start_s
    outcome = Outcome('kill -9 of all processes while starting', f'{seconds:.1f} s after the command')
    job.start()
    job.sleep(seconds)
    kill(job, outcome)
    return goes_on(campaign, job, outcome)


def killed_twice(campaign: Campaign, folder: Path) -> Outcome:
    """Again while it resumes, and once more after it."""
    job = campaign.job(folder, base_config(campaign.data))
    steps = sorted(campaign.rng.sample(range(SAVE_EVERY, STEPS - 4), 2))
    outcome = Outcome('kill -9 of all processes, three times', f'step {steps[0]}, while resuming, step {steps[1]}')
    for step in (steps[0], None, steps[1]):
        job.start()
        if step is None:
            job.sleep(campaign.rng.uniform(0.5, 1.1) * campaign.reference().start_s)
        kill(job, outcome, step)
    return goes_on(campaign, job, outcome)


def killed_in_write(sharded: bool, who: str) -> Callable[[Campaign, Path], Outcome]:
    """At the moment at which an unfinished checkpoint is on the disk."""

    def produce(campaign: Campaign, folder: Path) -> Outcome:
        job = campaign.job(folder, base_config(campaign.data, sharded))
        step = SAVE_EVERY * campaign.rng.randint(1, STEPS // SAVE_EVERY - 1)
        outcome = Outcome(f'kill -9 of {who} while a {"sharded " if sharded else ""}checkpoint is written', f'step {step}')
        save_folder = Path(job.config['save_folder'])
        job.start()
        job.wait_for_step(step - 2)
        target = job.rank_pid(int(who[-1])) if who.startswith('rank') else None
        job.wait_until(lambda: _is_writing(save_folder, step), f'the write of the checkpoint of step {step}')
        if target is None:
            kill(job, outcome)
        else:
            os.kill(target, signal.SIGKILL)
            _after_death(job, outcome)
        return goes_on(campaign, job, outcome, sharded)

    return produce


def _is_writing(folder: Path, step: int) -> bool:
    if not folder.is_dir():
        return False
    names = os.listdir(folder)
    if any(name.startswith('.incomplete') and f'ba{step}' in name for name in names):
        return True
    return any(name.endswith(f'-ba{step}') and not (folder / name / '.metadata').exists() for name in names)


def full_disk(sharded: bool) -> Callable[[Campaign, Path], Outcome]:
    """A disk with room for a random number of checkpoints; then it grows."""

    def produce(campaign: Campaign, folder: Path) -> Outcome:
        disk = folder / 'disk'
        megabytes = campaign.rng.randint(15, 45)
        with _tmpfs(disk, megabytes):
            config = base_config(campaign.data, sharded, save_folder=str(disk / 'ckpt'), save_num_checkpoints_to_keep=-1)
            job = campaign.job(folder, config)
            outcome = Outcome(f'full disk{" (sharded)" if sharded else ""}', f'{megabytes} MB')
            job.start()
            _after_death(job, outcome)
            if not re.search(r'could not be written|No space left', job.output):
                raise Failed(f'the full disk is not named: {job.output[-600:]}')
            outcome.cause = outcome.cause or 'could not be written'
            subprocess.run(['mount', '-o', 'remount,size=400m', str(disk)], check=True)
            return goes_on(campaign, job, outcome, sharded)

    return produce


@contextlib.contextmanager
def _tmpfs(folder: Path, megabytes: int) -> Iterator[None]:
    folder.mkdir(parents=True)
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={megabytes}m', 'tmpfs', str(folder)], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        raise Skipped(f'a tmpfs cannot be mounted here: {mounted.stderr.strip()}')
    try:
        yield
    finally:
        subprocess.run(['umount', '-l', str(folder)], check=True)


def damaged_shard(how: str) -> Callable[[Campaign, Path], Outcome]:
    """A shard of the data is damaged while the run is down; the resume must name it, not train on it."""

    def produce(campaign: Campaign, folder: Path) -> Outcome:
        folder.mkdir(parents=True)
        data = shutil.copytree(campaign.data, folder / 'data')
        job = campaign.job(folder, base_config(data))
        step = _random_step(campaign, first=SAVE_EVERY + 1, last=12)  # in the first epoch, so that the shard is still to be read
        shard = campaign.rng.choice(sorted((data / 'train').glob('shard.*')))
        outcome = Outcome(f'{how} data shard', f'step {step}, {shard.name}')
        job.start()
        kill(job, outcome, step)
        whole = shard.read_bytes()
        place = campaign.rng.randrange(len(whole))
        damage(shard, how, place)
        outcome.moment += f', byte {place}'
        refuse(job, outcome, re.escape(shard.name))
        shard.write_bytes(whole)
        return goes_on(campaign, job, outcome)

    return produce


def damage(path: Path, how: str, place: int) -> None:
    """Flips one bit of the byte at ``place``, or cuts the file there."""
    if how == 'truncated':
        os.truncate(path, place)
        return
    with path.open('r+b') as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << (place % 8))]))


def damaged_checkpoint(how: str, sharded: bool = False, which: str = '*') -> Callable[[Campaign, Path], Outcome]:
    """The newest checkpoint is damaged while the run is down; the resume must say so and go on from the one before (or notice nothing because nothing that is read has changed)."""

    def produce(campaign: Campaign, folder: Path) -> Outcome:
        job = campaign.job(folder, base_config(campaign.data, sharded))
        step = _random_step(campaign, first=2 * SAVE_EVERY + 2)
        outcome = Outcome(f'{how} {"sharded " if sharded else ""}checkpoint')
        job.start()
        kill(job, outcome, step)
        save_folder = Path(job.config['save_folder'])
        newest = max(_checkpoints(save_folder, sharded), key=lambda p: int(re.search(r'ba(\d+)', p.name).group(1)))  # type: ignore[union-attr]
        files = [newest] if newest.is_file() else sorted(p for p in newest.rglob(which) if p.is_file())
        target = campaign.rng.choice(files)
        place = campaign.rng.randrange(target.stat().st_size)
        outcome.moment = f'step {step}, {target.name}, byte {place}'
        damage(target, how, place)
        resume(job, outcome)
        said = re.search(r'^.*(?:damaged|incomplete|corrupt)[^\n]*$', job.output, re.MULTILINE)
        outcome.cause = said.group(0).strip()[:160] if said else 'not noticed: the byte carries no information'
        check_final(campaign, job, sharded)
        return outcome

    return produce


def _checkpoints(folder: Path, sharded: bool) -> list[Path]:
    if sharded:
        return [p for p in folder.glob('ep*-ba*') if p.is_dir() and (p / '.metadata').exists()]
    return [p for p in folder.glob('ep*-ba*-rank0.pt') if not p.is_symlink()]


def lost_latest(campaign: Campaign, folder: Path) -> Outcome:
    """``latest`` names a checkpoint that is not there."""
    job = campaign.job(folder, base_config(campaign.data))
    step = _random_step(campaign, first=2 * SAVE_EVERY + 2)
    outcome = Outcome('latest names a file that is gone', f'step {step}')
    job.start()
    kill(job, outcome, step)
    latest = Path(job.config['save_folder']) / 'latest-rank0.pt'
    latest.resolve().unlink()
    return goes_on(campaign, job, outcome)


def stalled_worker(campaign: Campaign, folder: Path) -> Outcome:
    """The process that reads the data stops for good."""
    config = base_config(campaign.data)
    config['train_loader'] |= {'num_workers': 1, 'prefetch_factor': 1}
    job = campaign.job(folder, config)
    step = _random_step(campaign)
    outcome = Outcome('stalled reader (SIGSTOP of a loader worker)', f'step {step}')
    job.start()
    job.wait_for_step(step)
    rank = job.rank_pid(1)
    workers = [pid for pid in job.pids() if parent_of(pid) == rank and _is_python(pid)]
    if not workers:
        raise Skipped('no loader worker found')
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    _after_death(job, outcome)
    return goes_on(campaign, job, outcome)


def _is_python(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b'resource_tracker' not in Path(f'/proc/{pid}/cmdline').read_bytes()
    return False


def short_stall(campaign: Campaign, folder: Path) -> Outcome:
    """A rank stands still for less than the time limit: nothing may happen."""
    job = campaign.job(folder, base_config(campaign.data))
    step = _random_step(campaign)
    outcome = Outcome('rank 1 stands still for 4 s', f'step {step}')
    job.start()
    job.wait_for_step(0)
    pid = job.rank_pid(1)
    job.wait_for_step(step)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(pid, signal.SIGCONT)
    outcome.exit_code = job.wait()
    if outcome.exit_code != 0:
        raise Failed(f'the run ended with {outcome.exit_code}: {job.output[-600:]}')
    outcome.result = 'bit-identical'
    check_final(campaign, job)
    return outcome


KINDS: list[Fault] = [
    Fault('kill rank 0', signalled('rank 0', signal.SIGKILL), 2),
    Fault('kill rank 1', signalled('rank 1', signal.SIGKILL), 2),
    Fault('kill rank 1 (sharded)', signalled('rank 1', signal.SIGKILL, sharded=True)),
    Fault('kill launcher', signalled('the launcher', signal.SIGKILL), 2),
    Fault('kill all', signalled('all processes', signal.SIGKILL), 2),
    Fault('kill the only process', signalled('the command', signal.SIGKILL, ranks=0)),
    Fault('kill while starting', killed_while_starting, 2),
    Fault('kill three times', killed_twice),
    Fault('kill all in a write', killed_in_write(False, 'all processes'), 2),
    Fault('kill rank 0 in a write', killed_in_write(False, 'rank 0')),
    Fault('kill all in a sharded write', killed_in_write(True, 'all processes')),
    Fault('kill rank 1 in a sharded write', killed_in_write(True, 'rank 1')),
    Fault('terminate launcher', signalled('the launcher', signal.SIGTERM), 2),
    Fault('terminate rank', signalled('rank 1', signal.SIGTERM)),
    Fault('interrupt', signalled('all processes', signal.SIGINT)),
    Fault('full disk', full_disk(False)),
    Fault('full disk (sharded)', full_disk(True)),
    Fault('truncated shard', damaged_shard('truncated')),
    Fault('flipped bit in a shard', damaged_shard('flipped bit in a'), 2),
    Fault('flipped bit in a checkpoint', damaged_checkpoint('flipped bit in a'), 3),
    Fault('truncated checkpoint', damaged_checkpoint('truncated')),
    Fault('flipped bit in a sharded checkpoint', damaged_checkpoint('flipped bit in a', sharded=True, which='*.distcp'), 2),
    Fault('flipped bit in the metadata', damaged_checkpoint('flipped bit in the metadata of a', sharded=True, which='.metadata')),
    Fault('truncated sharded checkpoint', damaged_checkpoint('truncated', sharded=True, which='*.distcp')),
    Fault('lost latest', lost_latest),
    Fault('stalled rank', signalled('rank 1', signal.SIGSTOP), 2),
    Fault('stalled reader', stalled_worker),
    Fault('short stall', short_stall),
]
