"""Seconds by part of a model, read from a trace of torch's profiler in which every part runs in a named range."""

import bisect

PREFIX = "yojo: "  # of the ranges' names, before the part's


def seconds_by_part(events, *, on_gpu, skip=0):
    """Read seconds by part from a trace of torch's profiler.

    Args:
        events: the "traceEvents" of a Chrome trace. Its ranges named `PREFIX` + part belong to that part; passes are
            the outermost of them.
        on_gpu: sum the time of kernels (copies and fills too) by the range they were launched in; otherwise sum the
            time of the ranges themselves, without that of ranges inside them.
        skip: passes to leave out, from the first.

    Returns:
        dict part -> seconds.
    """
    pieces = _pieces(events, skip)
    total = {}
    if not on_gpu:
        for start, end, part in pieces:
            total[part] = total.get(part, 0.0) + (end - start) * 1e-6
        return total
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    starts = [start for start, _, _ in pieces]
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            at = launched.get(event.get("args", {}).get("correlation"), event["ts"])
            place = bisect.bisect_right(starts, at) - 1
            if place >= 0:  # before the first piece is what was skipped
                inside = at <= pieces[place][1]
                part = pieces[place][2] if inside else "other"
                total[part] = total.get(part, 0.0) + event["dur"] * 1e-6
    return total


def _pieces(events, skip):
    """Nested ranges cut into pieces (start, end, part) that belong to the innermost one, in microseconds, in order."""
    found = [
        (event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(PREFIX))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)
    ]
    pieces, open_ranges, passes, now = [], [], 0, 0.0

    def close(until):
        nonlocal now
        while open_ranges and open_ranges[-1][0] <= until:
            end, part = open_ranges.pop()
            add(end, part)
            now = max(now, end)

    def add(end, part):
        if passes > skip and end > now:
            pieces.append((now, end, part))

    for start, end, part in sorted(found, key=lambda one: (one[0], -one[1])):
        close(start)
        if open_ranges:
            add(start, open_ranges[-1][1])
        else:
            passes += 1
        now = start
        open_ranges.append((end, part))
    close(float("inf"))
    return pieces
