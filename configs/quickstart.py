# A character-level GPT on Shakespeare that learns in about a minute on two CPU cores: `make train` runs this.
# Two Ray Train workers share each iteration's micro-steps.

out_dir = "out/quickstart"
eval_interval = 200
eval_iters = 40
log_interval = 10

dataset = "quickstart"
gradient_accumulation_steps = 2
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

learning_rate = 2e-3
max_iters = 600
lr_decay_iters = 600
min_lr = 2e-4
beta2 = 0.99
warmup_iters = 50

num_workers = 2
compile = False  # compiling would take longer than training
