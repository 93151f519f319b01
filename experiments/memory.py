"""What to say where a device's memory is too small."""


def short(error: Exception, less: str) -> str:
    """The line that says so, and what takes less. Raises the error again if it is another one."""
    said = str(error).strip().partition("\n")[0]
    if "RESOURCE_EXHAUSTED" not in said:
        raise error
    reason = said.partition("RESOURCE_EXHAUSTED:")[2].strip()[:120]
    return f"the memory is too small ({reason}); {less} take less"
