# SPDX-License-Identifier: Apache-2.0
"""The host's ports that HCCL needs, and whether the kernel may give them to other programs' connections.

Source: HCCL's page of HCCL_IF_BASE_PORT.
"""

import os
from pathlib import Path

KERNEL = Path("/proc/sys/net/ipv4")
FIRST_PORT = 60000
NUM_PORTS = 32  # from HCCL_IF_BASE_PORT on


def hccl_ports(kernel: Path = KERNEL) -> tuple[str, str | None]:
    """HCCL's ports, such as 60000-60031, and the command that reserves them; None where nothing is to be done.

    kernel: the folder of the settings ip_local_port_range and ip_local_reserved_ports.
    """
    text = os.environ.get("HCCL_IF_BASE_PORT", "")
    base = int(text) if text.isdecimal() else FIRST_PORT
    ports = range(base, base + NUM_PORTS)
    needed = f"{ports[0]}-{ports[-1]}"
    try:
        first, last = map(int, (kernel / "ip_local_port_range").read_text(encoding="utf-8").split())
        reserved = (kernel / "ip_local_reserved_ports").read_text(encoding="utf-8").strip()
        taken = port_ranges(reserved)
    except (OSError, ValueError):  # a kernel without these settings, or a container that hides them
        return needed, None
    if not any(first <= port <= last and not any(port in some for some in taken) for port in ports):
        return needed, None
    return needed, f"sysctl -w net.ipv4.ip_local_reserved_ports={','.join(filter(None, [reserved, needed]))}"


def port_ranges(text: str) -> list[range]:
    """Parses the kernel's list of ports, such as 8080,60000-60031."""
    ends = [part.partition("-") for part in text.split(",") if part.strip()]
    return [range(int(low), int(high or low) + 1) for low, _, high in ends]
