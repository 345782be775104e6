# One job per notebook and parameter set. `make report` calls this; with PROFILE=slurm its jobs go to a cluster.
import signal
from _thread import start_new_thread
from pathlib import Path

from lowrank.io.dependencies import hash_code, sources
from lowrank.io.hashing import hash_files
from lowrank.report.errors import ParameterError
from lowrank.report.folders import outputs_folder
from lowrank.report.parameters import jobs, notebook_path, read_parameters
from lowrank.report.resources import read_resources

try:
    JOBS = jobs(str(config.get("sets", "")).split())
    VALUES, NEEDS = ({job: read(*job) for job in JOBS} for read in (read_parameters, read_resources))
except ParameterError as error:
    raise SystemExit(f"error: {error}")
OUTPUTS, HERE = outputs_folder(), Path.cwd()
OUTPUTS = OUTPUTS.relative_to(HERE) if OUTPUTS.is_relative_to(HERE) else OUTPUTS  # a clone that is moved keeps its results
# The trained models that come with the package: other ones make results anew.
MODELS = hash_files(sorted(Path("lowrank").glob("*/pretrained/*.safetensors")))
RESULT, DONE = f"{OUTPUTS}/{{set}}/{{notebook}}/run.json", f"{OUTPUTS}/.done/{{set}}-{{notebook}}"

wildcard_constraints:
    set=r"[a-z0-9-]+(@[a-z_]+=[\w.,+-]+)*",
    notebook="[0-9]{2}_[a-z0-9_]+",

# Snakemake's handler waits for locks, which the thread that it interrupts may hold: it waits in a thread of its own.
onstart:
    graceful = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *arguments: start_new_thread(graceful, arguments))

localrules: all

rule all:
    default_target: True
    input: [path.format(set=s, notebook=n) for s, n in JOBS for path in (RESULT, DONE)]

# A report that fails ends with the comparison, too; `make report` runs it after one that does not.
onerror:
    shell("python -m lowrank.report compare || true")

# The result is replaced as a whole by the runner, never deleted beforehand (`update`). That it is up to date is what
# DONE says. Other code or other parameters make a result anew; other words do not.
rule notebook:
    input: lock="requirements.lock"
    output: result=update(RESULT), done=touch(DONE)
    params:
        values=lambda w: VALUES[w.set, w.notebook],
        models=MODELS,
        code=lambda w: hash_code(sources(notebook_path(w.notebook), Path("lowrank/report/run.py"))),
    threads: lambda w: NEEDS[w.set, w.notebook]["cpus"]
    resources:
        mem_mb=lambda w: NEEDS[w.set, w.notebook]["memory_mb"],
        runtime=lambda w: NEEDS[w.set, w.notebook]["minutes"],
        gpu=lambda w: NEEDS[w.set, w.notebook]["gpus"],
    shell: "LOWRANK_BAR=$(({jobid} % 2)) python -m lowrank.report run {wildcards.set} {wildcards.notebook} > /dev/null"
