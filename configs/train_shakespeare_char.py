# A small GPT that learns Shakespeare character by character: nanoGPT's first example, with its settings.
#
#   orchestrator prepare shakespeare_char
#   orchestrator train configs/train_shakespeare_char.py
#
# One GPU of any size, a few minutes: 10.6M parameters. Weights, gradients and AdamW's two moments are four float32
# numbers, 16 bytes, per parameter: 0.2 GB; the activations of 64 x 256 characters take about 1 GB more.
# Without a GPU nanoGPT makes everything smaller, which is a matter of minutes too:
#
#   orchestrator train configs/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 \
#     --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 \
#     --lr_decay_iters=2000 --dropout=0.0

out_dir = "out-shakespeare-char"
eval_interval = 250  # often, because it will overfit
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # for the same reason `sample` shall take the best state, not the last

wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1  # so one worker; for N workers make this N and divide batch_size by N
batch_size = 64
block_size = 256  # characters that the model sees

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # a small model bears more
max_iters = 5000
lr_decay_iters = 5000  # as max_iters
min_lr = 1e-4  # a tenth of learning_rate
beta2 = 0.99  # more than usual, because there are few tokens in an iteration
warmup_iters = 100
