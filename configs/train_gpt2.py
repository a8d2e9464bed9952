# GPT-2 (124M) from nothing on OpenWebText, to a validation loss of about 2.85: nanoGPT's reproduction.
#
# The data are 9 billion tokens. nanoGPT's data/openwebtext/prepare.py makes them (it downloads 54 GB); they are read
# as they are, 17 GB on every node or on a disk that all nodes share:
#
#   orchestrator train configs/train_gpt2.py --data_dir=/shared/nanoGPT/data --out_dir=s3://bucket/gpt2-124M
#
# Eight A100 with 40 GB, about four days, as in nanoGPT; the batches do not depend on how many GPUs share the work.
# Memory per GPU: 16 bytes per parameter (float32 weights, gradients, AdamW's two moments) are only 2 GB. The rest
# is about 1 GB per sequence, more than half of it for the logits over 50,304 tokens: 14 GB in all, so 24 GB do. On
# 16 GB halve batch_size and double gradient_accumulation_steps, which is the same number of tokens per iteration.

out_dir = "out-gpt2-124M"
wandb_log = True  # needs pip install 'nanogpt-orchestrator[wandb]' and an account; --wandb_log=False does without
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 12 sequences * 1024 tokens * 40 micro-steps = 491,520 tokens per iteration
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
num_workers = 8  # nanoGPT's --nproc_per_node=8; any number up to 8 gives the same bits, up to 40 the same batches

# 600,000 iterations see 300 billion tokens
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
