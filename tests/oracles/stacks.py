"""All kernel stacks of a recorded guest as drgn follows them, and how long that took, as JSON: stacks.py CORE VMLINUX

VMLINUX holds the kernel's debug information. A frame is the address where the code goes on. Frames that exist in the debug information alone (functions
that were inlined) and those of the user's code are left out.
"""

import json
import sys
import time

import drgn
from drgn.helpers.linux.cpumask import for_each_online_cpu
from drgn.helpers.linux.sched import cpu_curr, idle_task

KERNEL = 1 << 63


def stack(trace):
    return [f"{frame.pc:#x}" for frame in trace if not frame.is_inline and frame.pc >= KERNEL]


def main(core, vmlinux):
    start = time.monotonic()
    program = drgn.Program()
    program.set_core_dump(core)
    program.load_debug_info([vmlinux])
    opened = time.monotonic()
    # Objects are made and traces taken by drgn's own code, so that little but that is timed.
    threads = [(thread, thread.stack_trace()) for thread in program.threads()]
    followed = time.monotonic()

    tasks = [
        {"pid": thread.tid, "address": f"{thread.object.value_():#x}", "frames": stack(trace)}
        for thread, trace in threads
    ]
    cpus = []
    for cpu in for_each_online_cpu(program):
        current = cpu_curr(program, cpu)
        idle = idle_task(program, cpu)
        cpus.append({"cpu": cpu, "current": f"{current.value_():#x}", "frames": stack(program.stack_trace(current))})
        if idle != current:
            tasks.append({"pid": 0, "address": f"{idle.value_():#x}", "frames": stack(program.stack_trace(idle))})
    json.dump({"open_s": opened - start, "follow_s": followed - opened, "tasks": tasks, "cpus": cpus}, sys.stdout)


main(*sys.argv[1:])
