"""The `dstrain` command and the launch scripts: parse, dispatch, exit codes, talk to people."""
