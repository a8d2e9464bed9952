# Finetune GPT-2 XL on Shakespeare on one GPU: nanoGPT's example, with its settings.
#
#   orchestrator prepare shakespeare
#   orchestrator train configs/finetune_shakespeare.py
#
# One GPU with 40 GB, a few minutes. 1,558M parameters at 16 bytes (float32 weights, gradients, AdamW's two moments)
# are 25 GB, their bfloat16 copies of one micro-step 3 GB, the activations of one sequence 4 GB. On less memory give
# --init_from=gpt2-large (774M: 12 + 2 + 2 GB) or gpt2-medium (355M). On several nodes: finetune_gpt2_xl.py.

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # it overfits soon: `sample` shall take the best state

wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = "finetune"

dataset = "shakespeare"
init_from = "gpt2-xl"

# 1 sequence * 1024 tokens * 32 micro-steps = 32,768 tokens per iteration; the text has 301,966, so 20 iterations
# are about two times through
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
