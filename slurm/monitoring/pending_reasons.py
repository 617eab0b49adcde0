"""SLURM's reason codes in words: why a job waits or has ended, and what to do about it.

words("BeginTime")               # held back until its start time, as SLURM does ...; wait (BeginTime)
words("QOSMaxGRESPerUser")       # no more GPUs for one user under the QOS now; wait (QOSMaxGRESPerUser)
words("ReqNodeNotAvail, UnavailableNodes:gpu[1-2]")

The codes are those of `job_state_reason.c` of SLURM 22.05 to 26.05 and of the page "Resource Limits" of its manual.
"""

import re

_WAIT = "wait"
_RESUBMIT = "stop it, correct the profile, then resume"

WORDS = {
    "None": "the scheduler has not looked at it yet",
    "WaitingForScheduling": "the scheduler has not looked at it yet",
    "SchedDefer": "the scheduler has not looked at it yet",
    "Priority": f"jobs of higher priority are before it; {_WAIT}",
    "Resources": f"first in line, its nodes or GPUs are still in use; {_WAIT}",
    "BeginTime": f"held back until its start time, as SLURM does for some minutes after a requeue; {_WAIT}",
    "Cleaning": f"its former life is still being cleaned up; {_WAIT}",
    "Prolog": f"the nodes are being prepared for it; {_WAIT}",
    "JobArrayTaskLimit": f"as many of its array run as are allowed at once; {_WAIT}",
    "Dependency": f"another job must end first; {_WAIT}",
    "DependencyNeverSatisfied": "the job it depends on has failed, so it will never start: stop it",
    "JobHeldUser": "held by you: scontrol release JOB",
    "JobHeldAdmin": "held by an administrator: ask them",
    "JobHoldMaxRequeue": "requeued more often than the site allows, and held: ask for a larger max_batch_requeue, then "
    "scontrol release JOB",
    "Licenses": f"a licence that it asks for is in use; {_WAIT}",
    "Reservation": "its reservation has not begun, or has ended: scontrol show reservation",
    "ReservationDeleted": f"its reservation was deleted; {_RESUBMIT} without it",
    "ReservationInvalid": f"its reservation is not valid; {_RESUBMIT}",
    "ReqNodeNotAvail": "nodes it needs are down, drained or reserved, perhaps for a maintenance before its time limit "
    "would be over: scontrol show reservation; fewer minutes may let it start",
    "PartitionNodeLimit": f"more nodes than the partition allows or has up; {_RESUBMIT} (nodes)",
    "PartitionTimeLimit": f"a longer time limit than the partition allows; {_RESUBMIT} (minutes)",
    "PartitionConfig": f"the partition cannot run it at all: too few nodes, or others than asked for; {_RESUBMIT}",
    "PartitionDown": f"the partition takes jobs but starts none; {_WAIT}, or use another one",
    "PartitionInactive": f"the partition starts no jobs; {_RESUBMIT} (partition)",
    "BadConstraints": f"no node fits its constraints; {_RESUBMIT} (constraint)",
    "Constraints": f"no node fits its constraints now; {_WAIT}, or ask for less (constraint)",
    "NodeDown": f"a node it needs is down; {_WAIT}, or ask the administrators",
    "FrontEndDown": "no front end node is up: ask the administrators",
    "InvalidAccount": f"the account is not valid; {_RESUBMIT} (account)",
    "AccountNotAllowed": f"the account may not use this partition; {_RESUBMIT} (account)",
    "InvalidQOS": f"the QOS is not valid; {_RESUBMIT} (qos)",
    "QOSNotAllowed": f"the QOS may not be used in this partition; {_RESUBMIT} (qos)",
    "QOSUsageThreshold": f"your usage is above what the QOS allows; {_WAIT}, or use another qos",
    "QOSJobLimit": f"as many jobs run as the QOS allows; {_WAIT}",
    "QOSResourceLimit": f"the jobs of the QOS hold all that it allows; {_WAIT}",
    "QOSTimeLimit": f"the QOS has used up its time; {_WAIT}, or use another qos",
    "AssociationJobLimit": f"as many jobs run as the account allows; {_WAIT}",
    "AssociationResourceLimit": f"the jobs of the account hold all that it allows; {_WAIT}",
    "AssociationTimeLimit": f"the account has used up its time; {_WAIT}, or use another account",
    "AccountingPolicy": f"a limit of the account or the QOS is reached; {_WAIT}",
    "DeadLine": "it cannot end before its deadline any more: stop it",
    "BurstBufferResources": f"the burst buffer is full; {_WAIT}",
    "BurstBufferStageIn": f"its files are being staged in; {_WAIT}",
    "BurstBufferOperation": "an operation on the burst buffer failed: ask the administrators",
    "MaxMemPerLimit": f"more memory than one job may have; {_RESUBMIT} (memory_gb)",
    "MaxPoweredUpNodes": f"as many nodes are powered up as the site allows; {_WAIT}",
    "NvidiaImexChannels": f"no channel between the GPUs of its nodes is free; {_WAIT}",
    "FedJobLock": f"the clusters of the federation are settling who runs it; {_WAIT}",
    "MpiPortsBusy": f"ports for its ranks are in use; {_WAIT}",
    # Of jobs that have ended:
    "NonZeroExitCode": "its batch script failed",
    "OutOfMemory": "it was out of memory",
    "RaisedSignal": "it was ended by a signal",
    "TimeLimit": "its time limit was over",
    "InactiveLimit": "it was inactive for longer than the site allows",
    "JobLaunchFailure": "it could not be launched: a missing program or folder, or a file system that is not mounted",
    "SystemFailure": "SLURM or a node failed: ask the administrators",
}
_LIMIT = re.compile(
    r"(?P<owner>QOS|Assoc|)(?P<kind>Grp|Max|Min)(?P<what>CPU|Cpu|GRES|Node|Memory|Mem|Jobs|SubmitJobs?|Wall|WallDuration|"
    r"Billing|BB|Energy|License|Unknown)(?P<budget>RunMinutes|RunMins|CPURunMinutes|Minutes|)"
    r"(?P<scope>PerJob|PerUser|PerNode|PerAccount|NotSatisfied|)"
)
_WHAT = {
    "CPU": "CPUs", "Cpu": "CPUs", "GRES": "GPUs", "Node": "nodes", "Memory": "memory", "Mem": "memory",
    "Jobs": "running jobs", "SubmitJob": "jobs in the queue", "SubmitJobs": "jobs in the queue", "Wall": "time",
    "WallDuration": "time", "Billing": "billing units", "BB": "burst buffer", "Energy": "energy",
    "License": "licences", "Unknown": "of a resource",
}  # fmt: skip
_OWNER = {"QOS": "the QOS", "Assoc": "the account", "": "the site"}
_OTHER = {"QOS": "another qos", "Assoc": "another account", "": "another partition"}


def words(code: str) -> str:
    """Return a sentence for a code, and the code behind it; one that is not known is given as it is."""
    name, comma, rest = code.partition(",")
    sentence = WORDS.get(name) or _limit(name)
    if sentence is None:
        return f"SLURM says {code}" if code else ""
    return f"{sentence} ({name}{':' if comma else ''}{rest})"


def _limit(name: str) -> str | None:
    """Explain the systematic names of limits: whose limit, on what, for whom."""
    match = _LIMIT.fullmatch(name.removesuffix("Limit"))
    if match is None:
        return None
    owner, resource, scope = match["owner"], _WHAT[match["what"]], match["scope"]
    if match["kind"] == "Min":
        return f"asks for less {resource} than {_OWNER[owner]} takes; {_RESUBMIT}"
    if scope in ("PerJob", "PerNode"):
        return f"asks for more {resource} than {_OWNER[owner]} allows one {scope[3:].lower()}; {_RESUBMIT}"
    grouped = match["kind"] == "Grp" and not scope
    who = "all jobs" if grouped else "one account" if scope == "PerAccount" else "one user"
    if match["budget"] or resource == "time":
        unit = resource if resource == "time" else f"time on {resource}"
        return f"no {unit} is left for {who} under {_OWNER[owner]}; {_WAIT}, or use {_OTHER[owner]}"
    return f"no more {resource} for {who} under {_OWNER[owner]} now; {_WAIT}"
