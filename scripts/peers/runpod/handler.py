"""A handler for the platform's own Python SDK: does what the job's input names."""

import asyncio

import runpod


async def handle(job):
    what = job["input"]
    kind = what["kind"]
    if kind == "raise":
        raise RuntimeError("no luck today")
    if kind == "error":
        return {"error": "bad input", "field": "rows"}
    if kind == "refresh":
        return {"refresh_worker": True, "left": 3}
    if kind == "progress":
        runpod.serverless.progress_update(job, {"stage": "training", "progress": 12.5})
        await asyncio.sleep(1)
    await asyncio.sleep(what.get("seconds", 0))
    return {"kind": kind, "sign": "\u00e9"}


runpod.serverless.start({"handler": handle})
