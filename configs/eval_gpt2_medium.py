# The loss of OpenAI's gpt2-medium (355M parameters) on OpenWebText, as it was published; nothing is trained.
#
#   orchestrator train configs/eval_gpt2_medium.py --data_dir=/shared/nanoGPT/data
#
# The data are made by nanoGPT's data/openwebtext/prepare.py. One GPU with 8 GB will do, because nothing is kept for
# gradients and AdamW: the weights take 1.4 GB (4 bytes per parameter), their bfloat16 copies 0.7 GB, and the logits
# of 8 x 1024 positions over 50,257 tokens about 4 GB, in bfloat16 and float32 (--loss_chunk=256: about 0.1 GB).

out_dir = "out-eval-gpt2-medium"
init_from = "gpt2-medium"  # n_layer=24, n_head=16, n_embd=1024
eval_only = True
eval_iters = 500  # more than in training, for a good estimate
batch_size = 8
wandb_log = False
