"""What a look-up costs in drgn, and what it gives, as JSON: lookups.py CORE VMLINUX WANTED

WANTED is a JSON file: "names" of symbols, "addresses" in the running kernel, and "members" as pairs of a structure and a path in it. Before each
kind is timed, all of it is looked up once, so that what drgn reads when it is first asked is not counted.
"""

import json
import sys
import time

import drgn


def timed(lookup, wanted):
    found = [lookup(of) for of in wanted]
    start = time.monotonic()
    for of in wanted:
        lookup(of)
    return {"each_us": (time.monotonic() - start) * 1e6 / len(wanted), "found": found}


def main(core, vmlinux, wanted):
    program = drgn.Program()
    program.set_core_dump(core)
    program.load_debug_info([vmlinux])
    with open(wanted) as file:
        wanted = json.load(file)
    json.dump(
        {
            "names": timed(lambda name: program.symbol(name).address, wanted["names"]),
            "addresses": timed(lambda address: program.symbol(address).address, wanted["addresses"]),
            "members": timed(lambda of: drgn.offsetof(program.type("struct " + of[0]), of[1]), wanted["members"]),
        },
        sys.stdout,
    )


main(*sys.argv[1:])
