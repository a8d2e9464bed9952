"""From the command to the first step: `startup` with small models, `xl_start` with GPT-2 XL's weights."""
