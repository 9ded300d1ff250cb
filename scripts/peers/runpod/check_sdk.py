"""Runs the platform's Python SDK as a worker of brightrun-sim and compares what it does with what its documentation
and source say it does. Usage: check_sdk.py SIMULATOR [SCENARIO ...]. Each line: scenario, fact, same or DIFFERS and how."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

SIMULATOR = sys.argv[1]
HERE = pathlib.Path(__file__).parent
VERSION = "1.12.0"
differences = 0
facts = 0
leads = []


class Run:
    """One simulator with one worker."""

    def __init__(self, name, jobs, faults=()):
        self.name, self.records, self.violations = name, [], []
        self.folder = tempfile.TemporaryDirectory()
        path = pathlib.Path(self.folder.name, "faults.json")
        path.write_text(json.dumps(list(faults)))
        command = [SIMULATOR, "--port", "0", "--json", "--ping-interval-ms", "1000", "--hold-s", "3", "--faults", path]
        self.simulator = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        start = json.loads(self.simulator.stdout.readline())
        self.url, self.environment = start["url"], start["environment"]
        self.reader = threading.Thread(target=self.read)
        self.reader.start()
        self.jobs = [self.client("run", {"input": job})["id"] for job in jobs]
        skip = {"RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true", "RUNPOD_SKIP_GPU_CHECK": "true"}
        self.log = open(pathlib.Path(self.folder.name, "log"), "w+")
        self.worker = subprocess.Popen(
            [sys.executable, HERE / "handler.py"],
            env={"PATH": os.environ["PATH"], **self.environment, **skip},
            stdout=self.log, stderr=subprocess.STDOUT,
        )

    def read(self):
        for line in self.simulator.stdout:
            record = json.loads(line)
            (self.violations if "violation" in record else self.records).append(record)

    def client(self, path, body=None):
        request = urllib.request.Request(f"{self.url}/v2/ep1/{path}", headers={"Authorization": "Bearer client-key"})
        if body is not None:
            request.data = json.dumps(body).encode()
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    def status(self, index=0):
        return self.client(f"status/{self.jobs[index]}")

    def wait(self, holds, seconds=20):
        end = time.time() + seconds
        while not holds() and time.time() < end:
            time.sleep(0.05)
        return holds()

    def calls(self, verb):
        return [record for record in self.records if f"/{verb}/" in record["path"]]

    def posts(self, index=None):
        posts = self.calls("job-done")
        return [post for post in posts if index is None or self.jobs[index] in post["path"]]

    def ended(self, index=0):
        return lambda: self.status(index)["status"] not in ("IN_QUEUE", "IN_PROGRESS")

    def fact(self, what, expected, found):
        global differences, facts
        facts += 1
        same = expected == found
        differences += not same
        print(f"{self.name:10} {what:58} " + ("same" if same else f"DIFFERS: expected {expected!r}, found {found!r}"))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.worker.poll() is None:
            self.worker.kill()
        self.worker.wait()
        self.simulator.send_signal(signal.SIGINT)
        self.simulator.wait()
        self.reader.join()
        self.folder.cleanup()
        first = [min((record["t"] for record in self.calls(verb)), default=0) for verb in ("ping", "job-take")]
        leads.append(round(1000 * (first[1] - first[0])))


def body(post):
    return json.loads(post["body"])


def success():
    with Run("success", [{"kind": "ok", "seconds": 3.2}]) as run:
        run.wait(run.ended())
        time.sleep(0.5)
        first = min(run.calls("ping"), key=lambda record: record["t"])
        takes = sorted(run.calls("job-take"), key=lambda record: record["t"])
        done = run.posts()[0]
        gpu = "gpu=NVIDIA+H200"
        run.fact("state", "COMPLETED", run.status()["status"])
        run.fact("body", {"output": {"kind": "ok", "sign": "\u00e9"}}, body(done))
        run.fact("take", f"/v2/ep1/job-take/pod1?{gpu}&job_in_progress=0", takes[0]["path"])
        run.fact("take, content type", "application/json", takes[0]["h"].get("content-type"))
        run.fact("idle ping", f"/v2/ep1/ping/pod1?{gpu}&runpod_version={VERSION}", first["path"])
        busy = [ping["path"] for ping in run.calls("ping") if "job_id" in ping["path"]]
        run.fact("ping during a job", f"/v2/ep1/ping/pod1?{gpu}&job_id={run.jobs[0]}&runpod_version={VERSION}", busy[0])
        run.fact("done", f"/v2/ep1/job-done/pod1/{run.jobs[0]}?{gpu}&isStream=false", done["path"])
        run.fact("done, content type", "application/x-www-form-urlencoded", done["h"].get("content-type"))
        run.fact("done, charset header", "utf-8", done["h"].get("charset"))
        run.fact("done, X-Request-ID", run.jobs[0], done["h"].get("x-request-id"))
        agent = f"RunPod-Python-SDK/{VERSION} "
        run.fact("done, user agent", True, done["h"]["user-agent"].startswith(agent))
        # A worker with one slot that is taken does not ask for more.
        during = [take for take in takes if takes[0]["t"] + 0.2 < take["t"] < done["t"] - 0.1]
        run.fact("takes during the job", 0, len(during))
        run.fact("stop polls during the job", True, len(run.calls("job-stop")) >= 1)
        run.fact("broken rules", [], run.violations)


def outcomes():
    kinds = ["raise", "error", "refresh", "progress"]
    with Run("outcomes", [{"kind": kind} for kind in kinds]) as run:
        run.wait(run.ended(3), 40)
        time.sleep(0.5)
        error = json.loads(body(run.posts(0)[0])["error"])
        names = ["error_type", "error_message", "error_traceback", "hostname", "worker_id", "runpod_version"]
        run.fact("exception: fields of the error text", names, list(error))
        run.fact("exception: type and message", ["<class 'RuntimeError'>", "no luck today"], [error["error_type"], error["error_message"]])
        run.fact("exception: state", "FAILED", run.status(0)["status"])
        run.fact("error dict: body", {"output": {"field": "rows"}, "error": "bad input"}, body(run.posts(1)[0]))
        run.fact("error dict: state", "FAILED", run.status(1)["status"])
        run.fact("refresh: body", {"output": {"left": 3}, "stopPod": True}, body(run.posts(2)[0]))
        run.fact("refresh: keeps taking jobs", "COMPLETED", run.status(3)["status"])
        progress = {"status": "IN_PROGRESS", "output": {"stage": "training", "progress": 12.5}}
        run.fact("progress: body", progress, body(run.posts(3)[0]))
        run.fact("progress: url is that of the result", run.posts(3)[0]["path"], run.posts(3)[1]["path"])
        run.fact("progress: state", "COMPLETED", run.status(3)["status"])
        after = [take for take in run.calls("job-take") if take["t"] > run.posts(0)[0]["t"]]
        run.fact("takes carry the last job's X-Request-ID", True, any("x-request-id" in take["h"] for take in after))
        run.fact("broken rules", [], run.violations)


def stopped():
    with Run("job-stop", [{"kind": "ok", "seconds": 30}, {"kind": "ok"}]) as run:
        run.wait(lambda: run.status(0)["status"] == "IN_PROGRESS")
        time.sleep(1)
        run.client(f"cancel/{run.jobs[0]}", {})
        run.fact("takes the next job", True, run.wait(run.ended(1)))
        run.fact("posts nothing for the stopped job", [], run.posts(0))
        run.fact("state", "CANCELLED", run.status(0)["status"])
        run.fact("the worker stays up", None, run.worker.poll())


def terminated():
    with Run("SIGTERM", [{"kind": "ok", "seconds": 4}]) as run:
        run.wait(lambda: run.status(0)["status"] == "IN_PROGRESS")
        time.sleep(1)
        run.worker.send_signal(signal.SIGTERM)
        run.wait(lambda: run.worker.poll() is not None, 30)
        run.fact("the running job is finished", "COMPLETED", run.status(0)["status"])
        run.fact("exit code", 0, run.worker.poll())
    with Run("SIGTERM", []) as run:
        run.wait(lambda: run.calls("ping"))
        # The second long poll is open by now.
        run.wait(lambda: len(run.calls("job-take")) >= 1)
        time.sleep(0.5)
        run.worker.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        run.jobs.append(run.client("run", {"input": {"kind": "ok"}})["id"])
        run.wait(lambda: run.worker.poll() is not None, 30)
        run.fact("a job taken after it is dropped: posts", [], run.posts(0))
        run.fact("a job taken after it is dropped: state", "IN_PROGRESS", run.status(0)["status"])
        run.fact("exit code", 0, run.worker.poll())


def refused():
    once = {"status": {"code": 500}}
    with Run("500 x 2", [{"kind": "ok"}], [{"route": "done", "last": 2, "action": once}]) as run:
        run.wait(run.ended(), 30)
        time.sleep(0.3)
        times = [post["t"] for post in run.posts()]
        run.fact("attempts", 3, len(times))
        run.fact("waits, whole seconds", [2, 3], [round(b - a) for a, b in zip(times, times[1:])])
        run.fact("state", "COMPLETED", run.status()["status"])
    with Run("500 x 9", [{"kind": "ok"}], [{"route": "done", "last": 9, "action": once}]) as run:
        run.wait(lambda: len(run.posts()) == 3, 30)
        time.sleep(8)
        run.fact("attempts before it gives up", 3, len(run.posts()))
        run.fact("state: the result is lost", "IN_PROGRESS", run.status()["status"])
        rules = {violation["violation"] for violation in run.violations}
        run.fact("broken rules: its pings forget the job", {"PingWithoutJob"}, rules)
    for action, name in [("reset", "reset"), ("reset_after", "reset after")]:
        with Run(name, [{"kind": "ok"}], [{"route": "done", "last": 1, "action": action}]) as run:
            run.wait(lambda: len(run.posts()) >= 1, 30)
            time.sleep(8)
            run.fact("attempts", 1, len(run.posts()))
    with Run("400", [{"kind": "ok"}], [{"route": "done", "last": 1, "action": {"status": {"code": 400}}}]) as run:
        run.wait(lambda: len(run.posts()) >= 1, 30)
        time.sleep(8)
        run.fact("attempts", 1, len(run.posts()))


def throttled():
    code = lambda first, last, status: {"route": "take", "first": first, "last": last, "action": {"status": {"code": status}}}
    with Run("take", [{"kind": "ok"}], [code(1, 4, 500), code(5, 5, 429), code(6, 6, 400)]) as run:
        run.wait(run.ended(), 30)
        time.sleep(0.3)
        times = [take["t"] for take in run.calls("job-take")]
        run.fact("after 500: asks again at once", True, times[3] - times[0] < 0.5)
        print(f"{run.name:10} four answers of 500 took {(times[3] - times[0]) * 1000:.0f} ms")
        run.fact("after 429: waits, whole seconds", 5, round(times[5] - times[4]))
        run.fact("after 400: asks again at once", True, times[6] - times[5] < 0.5)
        run.fact("state", "COMPLETED", run.status()["status"])


SCENARIOS = (success, outcomes, stopped, terminated, refused, throttled)
for scenario in SCENARIOS:
    if not sys.argv[2:] or scenario.__name__ in sys.argv[2:]:
        scenario()
# Ping and take come from two processes, so their order is a race.
print(f"the first ping came before the first take by {min(leads)} to {max(leads)} ms in {len(leads)} starts")
print(f"{facts} facts, {differences} differ")
sys.exit(differences > 0)
