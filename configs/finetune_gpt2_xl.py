# Finetune GPT-2 XL (1,558M parameters) on your own text, on four or more GPUs of preemptible nodes.
#
#   orchestrator prepare mine --text '/shared/texts/*.txt' --data_dir=/shared/data
#   orchestrator train configs/finetune_gpt2_xl.py --dataset=mine --data_dir=/shared/data --out_dir=s3://bucket/mine
#
# Every GPU holds the whole model, so it needs 40 GB or more: A100, L40S, H100. Float32 weights (6.2 GB), gradients
# (6.2 GB, on several workers too) and AdamW's two moments (12.5 GB) are 16 bytes per parameter, 25 GB; bfloat16 copies
# of the weights take 3 GB during a micro-step, activations and logits 4 GB for each sequence of 1,024 tokens, CUDA and
# NCCL 1 to 2 GB. So batch_size=1 needs 33 to 34 GB and should fit 40 GB (docs/gpu-memory.md has the count; no GPU has
# shown it yet). With 80 GB try --batch_size=4 --gradient_accumulation_steps=8, the same global batch in fewer, larger
# micro-steps. --activation_checkpointing=True --loss_chunk=256 brings a sequence down to about 0.6 GB for a third more
# time, so that 40 GB should hold --batch_size=8 as well. More GPUs do not make it smaller, only faster.
#
# A checkpoint is 18.7 GB (weights and moments); with the next one being written, each run keeps up to four of them.
# A node needs host memory for copies of it as well: 64 GB.

out_dir = "out-gpt2-xl"
init_from = "gpt2-xl"
dataset = "shakespeare"

# 1 sequence * 1024 tokens * 32 micro-steps = 32,768 tokens per iteration, over all workers together
batch_size = 1
block_size = 1024
gradient_accumulation_steps = 32
num_workers = "2-8"  # as many GPUs as are there: any number from 1 to 32 gives the same bits

max_iters = 2000
learning_rate = 1e-5  # low and constant: the weights are good already
decay_lr = False
dropout = 0.1  # little text, large model
dtype = "auto"  # bfloat16 on the GPUs named above

eval_interval = 100
eval_iters = 40
log_interval = 1
always_save_checkpoint = False  # `sample` and `export` take the state that was best on the validation text

# Nodes may vanish at two minutes' notice or at none. The others have every completed iteration in their memory and go
# on from there; a checkpoint in storage is for the day on which all of them go at once. 20 iterations are some minutes.
checkpoint_interval = 20
max_failures = -1  # preemption is no reason to give up
