"""Pretrain a GPT: ``megalibi pretrain`` as a script, which deepspeed, torchrun, srun or plain python start."""

from megalibi.cli.main import start_script

if __name__ == "__main__":
    start_script("pretrain")
