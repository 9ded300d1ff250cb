"""Executes on PostgreSQL what a worker wrote into the simulator's rows, and compares what both refuse.
Usage: check_rows.py BINARIES DSN FOLDER. Exit code 1 if anything differs."""

import atexit
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import psycopg
from psycopg import sql

BINARIES, DSN, FOLDER = pathlib.Path(sys.argv[1]).resolve(), sys.argv[2], pathlib.Path(sys.argv[3])
HERE = pathlib.Path(__file__).resolve().parent
DEMO = HERE.parents[2] / "examples" / "demo"
JOBS, METRICS = "pipeline_training_jobs", "pipeline_training_metrics"
TRAINED, FAILED = (f"00000000-0000-4000-8000-{number:012}" for number in (1, 2))
USER = "00000000-0000-4000-a000-000000000001"
# What PostgREST says of its own accord, from its copy of the schema, where the server would say the other.
OWN_CODES = {"PGRST204": "42703", "PGRST205": "42P01", "PGRST102": "22P02"}
OPERATORS = {"eq": "=", "neq": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
differences = 0


def differs(what, expected, found):
    global differences
    differences += 1
    print(f"DIFFERS {what}: expected {expected!r}, found {found!r}")


class Simulator:
    def __init__(self, *more):
        command = [BINARIES / "brightrun-sim", "--port", "0", "--json", "--hold-s", "1", "--ping-interval-ms", "1000", "--files", DEMO, *more]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        atexit.register(self.process.kill)
        start = json.loads(self.process.stdout.readline())
        self.url, self.environment = start["url"], start["environment"]
        self.records = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        self.records.extend(json.loads(line) for line in self.process.stdout)

    def call(self, method, path, key, body=None, **headers):
        headers |= {"Authorization": f"Bearer {key}", "apikey": key, "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", body.encode() if body else None, headers, method=method)
        try:
            with urllib.request.urlopen(request) as reply:
                return reply.status, json.loads(reply.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def end(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait()
        self.reader.join()


def seeds():
    """The rows as the application leaves them: the second with fewer digits in its time."""
    for job, at in ((TRAINED, "2026-11-28T12:00:00.123456+00:00"), (FAILED, "2026-11-28T12:00:00.5+00:00")):
        yield {"id": job, "user_id": USER, "status": "initializing", "progress": 0, "updated_at": at}


def work():
    """Runs a job that is trained and one whose data set is not there. What the worker wrote and read, in order."""
    arguments = []
    for number, row in enumerate(seeds()):
        path = FOLDER / f"row-{number}.json"
        path.write_text(json.dumps(row))
        arguments += ["--row", path]
    volume = FOLDER / "volume"
    (volume / "models" / "brightrun").mkdir(parents=True)
    (volume / "models" / "brightrun" / "demo").symlink_to(DEMO / "model")
    simulator = Simulator(*arguments)
    jobs = []
    for job, file in ((TRAINED, "pairs.jsonl"), (FAILED, "nowhere.jsonl")):
        parameters = {"base_model": "brightrun/demo", "learning_rate": 0.005, "batch_size": 8, "epochs": 3, "rank": 8, "alpha": 16, "dropout": 0.05}
        body = {"input": {"job_id": job, "dataset_url": f"{simulator.url}/files/{file}", "hyperparameters": parameters, "config": {"sequence_len": 512}}}
        jobs.append(simulator.call("POST", "v2/ep1/run", "client-key", json.dumps(body))[1]["id"])
    own = {
        "BRIGHTRUN_ALLOW_PRIVATE_URLS": "1", "BRIGHTRUN_VOLUMES": str(volume), "BRIGHTRUN_DEVICE": "cpu", "BRIGHTRUN_REPORT_S": "0.2",
        "BRIGHTRUN_LEASE_S": "3", "BRIGHTRUN_RETRY_S": "5", "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true", "RAYON_NUM_THREADS": "1",
    }
    log = FOLDER / "worker.log"
    with open(log, "w") as out:
        worker = subprocess.Popen([BINARIES / "brightrun", "worker"], env=simulator.environment | own, cwd=FOLDER, stdout=out, stderr=out)
    ends, deadline = [], time.time() + 120
    while time.time() < deadline:
        ends = [simulator.call("GET", f"v2/ep1/status/{job}", "client-key")[1]["status"] for job in jobs]
        if not {"IN_QUEUE", "IN_PROGRESS"} & set(ends):
            break
        time.sleep(0.2)
    # The row is looked at once more after its last update.
    time.sleep(1.5)
    worker.kill()
    worker.wait()
    rows = {table: simulator.call("GET", f"rest/v1/{table}?select=*&limit=100", "service-key")[1] for table in (JOBS, METRICS)}
    simulator.end()
    if ends != ["COMPLETED", "FAILED"]:
        print(log.read_text())
        sys.exit(f"the jobs ended as {ends}")
    records = [record for record in simulator.records if record.get("path", "").startswith("/rest/v1/")]
    return [record for record in records if "limit=100" not in record["path"]], rows


def parts(path):
    """Table, filters as a condition, and their operands. PostgREST sends operands without a type: the column gives it."""
    url = urllib.parse.urlsplit(path)
    conditions, operands = [sql.SQL("true")], []
    for name, value in urllib.parse.parse_qsl(url.query, keep_blank_values=True):
        if name in ("select", "order", "limit"):
            continue
        operator, _, operand = value.partition(".")
        if operator == "is":
            conditions.append(sql.SQL("t.{} IS {}").format(sql.Identifier(name), sql.SQL(operand)))
            continue
        conditions.append(sql.SQL("t.{} {} %s").format(sql.Identifier(name), sql.SQL(OPERATORS[operator])))
        operands.append(operand)
    return url.path.rpartition("/")[2], sql.SQL(" AND ").join(conditions), operands


def execute(database, method, path, body):
    """The statement PostgREST makes of a request. The rows read or written, as JSON."""
    table, condition, operands = parts(path)
    name = sql.Identifier(table)
    if method == "GET":
        statement = sql.SQL("SELECT row_to_json(t)::text FROM {} t WHERE {}").format(name, condition)
        return [json.loads(row) for (row,) in database.execute(statement, operands)]
    if method == "PATCH":
        keys = list(json.loads(body)) if body.startswith("{") else []
        changes = sql.SQL(", ").join(sql.SQL("{0} = b.{0}").format(sql.Identifier(key)) for key in keys)
        statement = sql.SQL(
            "UPDATE {0} t SET {1} FROM (SELECT * FROM json_populate_record(null::{0}, %s::json)) b WHERE {2} RETURNING row_to_json(t)::text"
        ).format(name, changes, condition)
        return [json.loads(row) for (row,) in database.execute(statement, [body, *operands])]
    sent = json.loads(body)
    rows = sent if isinstance(sent, list) else [sent]
    columns = sql.SQL(", ").join(map(sql.Identifier, rows[0]))
    statement = sql.SQL(
        "INSERT INTO {0} AS t ({1}) SELECT {1} FROM json_populate_recordset(null::{0}, %s::json) RETURNING row_to_json(t)::text"
    ).format(name, columns)
    return [json.loads(row) for (row,) in database.execute(statement, [json.dumps(rows)])]


def same(sent, held):
    if isinstance(sent, str) and isinstance(held, str) and sent != held:
        try:
            return datetime.datetime.fromisoformat(sent.replace("Z", "+00:00")) == datetime.datetime.fromisoformat(held)
        except ValueError:
            return False
    return sent == held and isinstance(sent, bool) == isinstance(held, bool)


def replay(database, records):
    """Everything the worker sent, on the real server. Counts, and the type of each column that was written."""
    counts, columns, values = {}, {}, 0
    for record in records:
        method, path, body = record["m"], record["path"], record["body"]
        table = parts(path)[0]
        counts[method, table] = counts.get((method, table), 0) + 1
        if not 200 <= (record["status"] or 0) < 300:
            differs(f"{method} {path}: the simulator", "2xx", record["status"])
        try:
            rows = execute(database, method, path, body)
        except psycopg.Error as error:
            differs(f"{method} {path} {body}", "success", f"{error.sqlstate} {error}")
            continue
        sent = json.loads(body) if body else []
        sent = sent if isinstance(sent, list) else [sent]
        if len(rows) != (len(sent) or 1):
            differs(f"{method} {path}: rows", len(sent) or 1, len(rows))
            continue
        for fields, row in zip(sent, rows):
            for name, value in fields.items():
                values += 1
                columns.setdefault((table, name), set()).add(type(value).__name__)
                if not same(value, row[name]):
                    differs(f"{table}.{name}", value, row[name])
        for row in rows if table == JOBS else []:
            # A claim names the time that it read: the server has to find the row by its own text of it.
            found = execute(database, "GET", f"/rest/v1/{JOBS}?" + urllib.parse.urlencode({"id": f"eq.{row['id']}", "updated_at": f"eq.{row['updated_at']}"}), "")
            if len(found) != 1:
                differs(f"rows by their updated_at {row['updated_at']}", 1, len(found))
    return counts, columns, values


def compare_states(database, rows):
    """In the end both hold the same, but for ids and times that each made itself."""
    compared = 0
    for table, held in rows.items():
        key = lambda row: (str(row.get("job_id")), str(row.get("metric_id")), row.get("step_number") or 0, row["id"] if table == JOBS else "")
        real = sorted(execute(database, "GET", f"/rest/v1/{table}?select=*", ""), key=key)
        held = sorted(held, key=key)
        if len(real) != len(held):
            differs(f"{table}: rows in the end", len(held), len(real))
        for ours, theirs in zip(held, real):
            for name, value in theirs.items():
                if name == "created_at" or (name == "id" and table == METRICS):
                    continue
                compared += 1
                if not same(ours[name], value):
                    differs(f"in the end, {table}.{name}", ours[name], value)
    return compared


def fields(**values):
    return json.dumps(values)


def metric(**values):
    return fields(**{"job_id": TRAINED, "metric_id": "training_loss", "metric_name": "Training Loss", "value": 1.5} | values)


ROW = f"{JOBS}?id=eq.{TRAINED}"
ASKED = [
    ("progress, fractional", "PATCH", ROW, fields(progress=45.5)),
    ("progress, 45.0", "PATCH", ROW, '{"progress": 45.0}'),
    ("progress, as text", "PATCH", ROW, fields(progress="45")),
    ("progress, null", "PATCH", ROW, fields(progress=None)),
    ("progress, text NaN", "PATCH", ROW, fields(progress="NaN")),
    ("progress, bare NaN", "PATCH", ROW, '{"progress": NaN}'),
    ("progress, too large", "PATCH", ROW, fields(progress=3_000_000_000)),
    ("current_epoch, fractional", "PATCH", ROW, fields(current_epoch=0.5)),
    ("current_step, true", "PATCH", ROW, fields(current_step=True)),
    ("training_time_seconds, fractional", "PATCH", ROW, fields(training_time_seconds=12.7)),
    ("current_loss, bare NaN", "PATCH", ROW, '{"current_loss": NaN}'),
    ("current_loss, bare Infinity", "PATCH", ROW, '{"current_loss": Infinity}'),
    ("current_loss, text NaN", "PATCH", ROW, fields(current_loss="NaN")),
    ("current_loss, words", "PATCH", ROW, fields(current_loss="low")),
    ("current_loss, 1e-320", "PATCH", ROW, '{"current_loss": 1e-320}'),
    ("actual_cost, three digits", "PATCH", ROW, fields(actual_cost=12.345)),
    ("actual_cost, too large", "PATCH", ROW, fields(actual_cost=1e9)),
    ("actual_cost, text NaN", "PATCH", ROW, fields(actual_cost="NaN")),
    ("actual_cost, text Infinity", "PATCH", ROW, fields(actual_cost="Infinity")),
    ("status, unknown", "PATCH", ROW, fields(status="done")),
    ("status, null", "PATCH", ROW, fields(status=None)),
    ("user_id, null", "PATCH", ROW, fields(user_id=None)),
    ("error_details, object", "PATCH", ROW, fields(error_details={"code": 1})),
    ("error_message, number", "PATCH", ROW, fields(error_message=5)),
    ("unknown column", "PATCH", ROW, fields(loss=1)),
    ("started_at, ISO 8601", "PATCH", ROW, fields(started_at="2026-01-10T12:00:00Z")),
    ("started_at, words", "PATCH", ROW, fields(started_at="yesterday-ish")),
    ("started_at, seconds", "PATCH", ROW, fields(started_at=1768046400)),
    ("started_at, milliseconds", "PATCH", ROW, fields(started_at=1768046400123)),
    ("started_at, seconds with fraction", "PATCH", ROW, fields(started_at=1768046400.5)),
    ("started_at, no such day", "PATCH", ROW, fields(started_at="2026-02-29T12:00:00Z")),
    ("started_at, no such hour", "PATCH", ROW, fields(started_at="2026-01-10T25:00:00Z")),
    ("started_at, no such zone", "PATCH", ROW, fields(started_at="2026-01-10T12:00:00+17:00")),
    ("started_at, no minutes", "PATCH", ROW, fields(started_at="2026-01-10T12")),
    ("filter: id, no uuid", "PATCH", f"{JOBS}?id=eq.job-1", fields(progress=1)),
    ("filter: id, no uuid, read", "GET", f"{JOBS}?id=eq.job-1", ""),
    ("filter: id, capitals", "GET", f"{JOBS}?id=eq.{TRAINED.upper()}", ""),
    ("filter: progress, words", "PATCH", f"{JOBS}?progress=gt.x", fields(progress=1)),
    ("filter: progress, fractional", "GET", f"{JOBS}?progress=lt.4.5", ""),
    ("filter: progress, too large", "GET", f"{JOBS}?progress=eq.3000000000", ""),
    ("filter: final_loss, words", "GET", f"{JOBS}?final_loss=lt.low", ""),
    ("filter: final_loss, too large", "GET", f"{JOBS}?final_loss=lt.1e400", ""),
    ("filter: actual_cost, large", "GET", f"{JOBS}?actual_cost=lt.1e12", ""),
    ("filter: actual_cost, Infinity", "GET", f"{JOBS}?actual_cost=lt.Infinity", ""),
    ("filter: status, unknown", "GET", f"{JOBS}?status=eq.done", ""),
    ("filter: status, true", "GET", f"{JOBS}?status=is.true", ""),
    ("filter: updated_at, words", "GET", f"{JOBS}?updated_at=lt.yesterday-ish", ""),
    ("filter: updated_at, seconds", "GET", f"{JOBS}?updated_at=lt.1768046400", ""),
    ("filter: unknown column", "PATCH", f"{JOBS}?job=eq.{TRAINED}", fields(progress=1)),
    ("unknown table", "PATCH", f"training_runs?id=eq.{TRAINED}", fields(progress=1)),
    ("metric", "POST", METRICS, metric()),
    ("metric: value, null", "POST", METRICS, metric(value=None)),
    ("metric: no value", "POST", METRICS, fields(job_id=TRAINED, metric_id="training_loss", metric_name="Training Loss")),
    ("metric: value, bare NaN", "POST", METRICS, metric().replace("1.5", "NaN")),
    ("metric: value, words", "POST", METRICS, metric(value="low")),
    ("metric: job_id, no uuid", "POST", METRICS, metric(job_id="job-1")),
    ("metric: level, unknown", "POST", METRICS, metric(metric_level="own")),
    ("metric: step_number, fractional", "POST", METRICS, metric(step_number=1.5)),
    ("metric: unknown column", "POST", METRICS, metric(step=1)),
    ("row: id twice", "POST", JOBS, fields(id=TRAINED, user_id=USER)),
    ("row: no user_id", "POST", JOBS, fields(status="pending")),
]


def ask_server(database, method, path, body):
    """Code and message of the server; PostgREST names a table where the statement here has `t`."""
    try:
        with database.transaction(force_rollback=True):
            if body:
                # PostgREST reads the body's keys first, as the server reads JSON.
                database.execute("SELECT %s::json", [body])
            execute(database, method, f"/rest/v1/{path}", body)
        return "accepted", None
    except psycopg.Error as error:
        return error.sqlstate, error.diag.message_primary.replace("column t.", f"column {JOBS}.")


def ask_both(database):
    simulator = Simulator()
    for row in seeds():
        simulator.call("POST", f"rest/v1/{JOBS}", "service-key", json.dumps(row))
    refused = 0
    for what, method, path, body in ASKED:
        status, reply = simulator.call(method, f"rest/v1/{path}", "service-key", body, Prefer="return=representation")
        ours, message = ("accepted", None) if status < 300 else (reply["code"], reply["message"])
        real, real_message = ask_server(database, method, path, body)
        refused += real != "accepted"
        if ours == real and message != real_message:
            differs(what, f"server's {real_message}", f"simulator's {message}")
        elif OWN_CODES.get(ours, ours) == real:
            note = "" if ours == real else " (PostgREST's own code)"
            print(f"{what:36} simulator {ours}, server {real}{note}")
        else:
            differs(what, f"server's {real}", f"simulator's {ours}")
    simulator.end()
    return refused


def main():
    records, rows = work()
    with psycopg.connect(DSN, autocommit=True) as database:
        print("PostgreSQL " + database.execute("SHOW server_version").fetchone()[0] + f", psycopg {psycopg.__version__}, Python {sys.version.split()[0]}")
        database.execute((HERE / "schema.sql").read_text())
        for row in seeds():
            execute(database, "POST", f"/rest/v1/{JOBS}", json.dumps(row))
        counts, columns, values = replay(database, records)
        for (method, table), count in sorted(counts.items()):
            print(f"{count:4} {method} {table}")
        for table in (JOBS, METRICS):
            types = dict(database.execute("SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0", [table]).fetchall())
            for (_, name), kinds in sorted(item for item in columns.items() if item[0][0] == table):
                print(f"{table}.{name}: {types[name]}, sent as {', '.join(sorted(kinds))}")
        print(f"{values} values sent, each is held as it was sent; {compare_states(database, rows)} values of the last state compared")
        refused = ask_both(database)
        print(f"{len(ASKED)} requests asked of both, {refused} refused; {differences} differences")
    sys.exit(differences > 0)


main()
