"""The only floor that knows every room: pretrain, finetune, evaluate, export."""
