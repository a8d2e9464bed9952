# Finetune GPT-2 XL (1,558M parameters) with LoRA on your own text, on GPUs with 24 GB (A10G, L4) of preemptible nodes.
# No GPU has shown the figures yet: `orchestrator plan` calculates them.
#
#   orchestrator plan configs/finetune_gpt2_xl_lora.py --gpu=L4
#   orchestrator prepare mine --text '/shared/texts/*.txt' --data_dir=/shared/data
#   orchestrator train configs/finetune_gpt2_xl_lora.py --dataset=mine --data_dir=/shared/data --out_dir=s3://b/mine
#
# The weights are frozen and held in bfloat16 (3.1 GB); adapters of 2.5M parameters are trained. Four sequences at a
# time take 11 GB of activations and logits; with CUDA and NCCL a GPU holds 15.2 of the 21.6 GB that we count on. With
# 16 GB give --activation_checkpointing=True, too. docs/lora.md tells about adapters, docs/small-gpus.md about cards.
#
# A state is 29 MB, and a node needs little more memory than its worker's process: 16 GB. Each iteration sends 9 to 23
# MB from a worker: at 10 Gbit/s 0.02 s, beside 1.2 s of computing on 8 L4 and 2.1 s on 8 A10G.

out_dir = "out-gpt2-xl-lora"
init_from = "gpt2-xl"
dataset = "shakespeare"

lora_rank = 8
lora_alpha = 32.0
lora_dropout = 0.1
lora_targets = "c_attn"
lora_base_dtype = "bfloat16"

# 4 sequences * 1024 tokens * 16 micro-steps = 65,536 tokens per iteration, over all workers together
batch_size = 4
block_size = 1024
gradient_accumulation_steps = 16
num_workers = "2-8"  # as many GPUs as are there

# Source: the settings for GPT-2 large in https://arxiv.org/abs/2106.09685, table 11
max_iters = 1000
learning_rate = 2e-4
warmup_iters = 50
lr_decay_iters = 1000
min_lr = 0.0
weight_decay = 0.01
dtype = "auto"  # bfloat16 on the GPUs named above

eval_interval = 50
eval_iters = 40
log_interval = 1
always_save_checkpoint = False  # `sample` and `export` take the state that was best on the validation text

checkpoint_interval = 50  # a checkpoint is small
max_failures = -1  # preemption is no reason to give up
