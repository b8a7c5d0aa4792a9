"""Runs a module as a program that ends with SIGSYS where it would speak to another: ``sealed.py MODULE ARGUMENT ...``.

The kernel looks (seccomp), so that libraries in C are seen, too, and their threads: nothing can be connected, and no datagram sent to
an address; what listens may answer. Name servers are asked that way, too. Linux on x86-64 and ARM.
"""

import ctypes
import platform
import runpy
import struct
import sys

CONNECT, SENDTO = {"x86_64": (42, 44), "aarch64": (203, 206)}.get(platform.machine(), (-1, -1))
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}.get(platform.machine(), 0)
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD | BPF_W | BPF_ABS, BPF_JMP | BPF_JEQ | BPF_K, BPF_RET | BPF_K
NUMBER, ARCH, ADDRESS = 0, 4, (48, 52)  # in struct seccomp_data; the last, of sendto's fifth argument
ALLOW, KILL = 0x7FFF0000, 0x80000000  # SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2


def can_seal() -> bool:
    return sys.platform == "linux" and CONNECT >= 0


def seal() -> None:
    rules = [
        (LOAD, 0, 0, ARCH),
        (EQUAL, 1, 0, AUDIT_ARCH),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (EQUAL, 6, 0, CONNECT),
        (EQUAL, 0, 4, SENDTO),
        (LOAD, 0, 0, ADDRESS[0]),
        (EQUAL, 0, 3, 0),
        (LOAD, 0, 0, ADDRESS[1]),
        (EQUAL, 0, 1, 0),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, KILL),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((NO_NEW_PRIVILEGES, 1, 0, 0, 0), (SET_SECCOMP, FILTER, program, 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "the process cannot be sealed")


if __name__ == "__main__":
    sys.argv.pop(0)
    seal()
    if sys.argv[0] == "-c":
        exec(sys.argv[1])
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
