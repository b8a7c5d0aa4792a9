"""Runs a module as a program that ends with SIGSYS where it would speak to the network: ``sealed.py [--listen] MODULE ARGUMENT ...``.

The kernel looks (seccomp), so that libraries in C are seen, too, and their threads. Without --listen no socket of the internet can be
made; with it, none can be connected, so that one that listens only answers. Linux on x86-64 and ARM.
"""

import ctypes
import platform
import runpy
import socket
import struct
import sys

SOCKET, CONNECT = {"x86_64": (41, 42), "aarch64": (198, 203)}.get(platform.machine(), (-1, -1))
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}.get(platform.machine(), 0)
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD | BPF_W | BPF_ABS, BPF_JMP | BPF_JEQ | BPF_K, BPF_RET | BPF_K
NUMBER, ARCH, FIRST_ARGUMENT = 0, 4, 16  # in struct seccomp_data
ALLOW, KILL = 0x7FFF0000, 0x80000000  # SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2


def can_seal() -> bool:
    return sys.platform == "linux" and SOCKET >= 0


def seal(listen: bool) -> None:
    if listen:
        rules = [(LOAD, 0, 0, NUMBER), (EQUAL, 0, 1, CONNECT), (RETURN, 0, 0, KILL)]
    else:
        rules = [
            (LOAD, 0, 0, NUMBER),
            (EQUAL, 0, 4, SOCKET),
            (LOAD, 0, 0, FIRST_ARGUMENT),
            (EQUAL, 1, 0, socket.AF_INET),
            (EQUAL, 0, 1, socket.AF_INET6),
            (RETURN, 0, 0, KILL),
        ]
    rules = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, AUDIT_ARCH), (RETURN, 0, 0, KILL), *rules, (RETURN, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((NO_NEW_PRIVILEGES, 1, 0, 0, 0), (SET_SECCOMP, FILTER, program, 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "the process cannot be sealed")


if __name__ == "__main__":
    sys.argv.pop(0)
    listen = sys.argv[0] == "--listen"
    if listen:
        sys.argv.pop(0)
    seal(listen)
    if sys.argv[0] == "-c":
        exec(sys.argv[1])
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
