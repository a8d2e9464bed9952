# Finetune all of GPT-2 XL (1,558M parameters) on your own text, on GPUs with 40 GB or more of preemptible nodes. For
# GPUs with 24 GB: finetune_gpt2_xl_lora.py. No GPU has shown the figures yet: `orchestrator plan` calculates them.
#
#   orchestrator plan configs/finetune_gpt2_xl.py --gpu=L40S
#   orchestrator prepare mine --text '/shared/texts/*.txt' --data_dir=/shared/data
#   orchestrator train configs/finetune_gpt2_xl.py --dataset=mine --data_dir=/shared/data --out_dir=s3://bucket/mine
#
# Every GPU holds the whole model: float32 weights (6.2 GB), gradients (6.2 GB) and AdamW's two moments (12.5 GB), with
# bfloat16 copies of the weights (3.1 GB), activations and logits of one sequence (3.6 GB), CUDA and NCCL 32.7 GB in
# all: A100, L40S, H100. With 80 GB try --batch_size=4 --gradient_accumulation_steps=200, the same global batch in
# fewer, larger micro-steps. --activation_checkpointing=True --loss_chunk=256 saves 3.1 GB for a third more time.
#
# A checkpoint is 18.7 GB (weights and moments); with the next one being written, each run keeps up to four of them. A
# node keeps two in its memory, and up to 17.2 GB for gradients that wait: 59 GB in all, so take nodes with 64 GB.

out_dir = "out-gpt2-xl"
init_from = "gpt2-xl"
dataset = "shakespeare"

# Each iteration sends 6 GB (2 workers) to 15 GB (5 workers) from a worker over the network. So that this takes less
# than a third of the time at 25 Gbit/s, an iteration is long: 3.5 s beside 7.3 s of computing on 8 L40S, 8.4 s on 8
# A100 (at 40 % of their peak). On 8 H100 it would be over a half: they want 100 Gbit/s.
# 1 sequence * 1024 tokens * 800 micro-steps = 819,200 tokens per iteration, over all workers together
batch_size = 1
block_size = 1024
gradient_accumulation_steps = 800
num_workers = "2-8"  # as many GPUs as are there: any number from 1 to 8 gives the same bits
lanes = 8  # more lanes balance 5 to 7 workers better, and send and hold more

max_iters = 80  # 65 million tokens
learning_rate = 5e-5  # low and constant: the weights are good already; the batch is large
decay_lr = False
dropout = 0.1  # little text, large model
dtype = "auto"  # bfloat16 on the GPUs named above

eval_interval = 10
eval_iters = 40
log_interval = 1
always_save_checkpoint = False  # `sample` and `export` take the state that was best on the validation text

# Nodes may vanish at two minutes' notice or at none. The others have every completed iteration in their memory and go
# on from there; a checkpoint in storage is for the day on which all of them go at once. 10 iterations are some minutes.
checkpoint_interval = 10
max_failures = -1  # preemption is no reason to give up
