"""Start `dstrain evaluate` under deepspeed, torchrun, srun or plain python; ranks come from the environment."""

from dstrain.cli.main import stage_entry

if __name__ == "__main__":
    stage_entry("evaluate")
