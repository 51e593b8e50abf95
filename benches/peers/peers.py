"""What other libraries offer for the same computations, on torch tensors.

Every function takes a builder's seed from torch's generator and returns `{pass: callable}`; a callable runs once.
Gradients are taken for every floating-point input (and parameter), as ours are.
"""

import torch
import torch.nn.functional as F

torch.manual_seed(0)


def passes(f, inputs, parameters=()):
    """The forward pass without a graph, and the forward pass with the gradients of all inputs and parameters."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    cotangent = None

    def forward():
        with torch.no_grad():
            return f(*inputs)

    def forward_backward():
        nonlocal cotangent
        o = f(*leaves)
        if cotangent is None:
            cotangent = torch.randn_like(o)
        return torch.autograd.grad(o, [*leaves, *parameters], cotangent, allow_unused=True)

    return {"forward": forward, "forward+backward": forward_backward}


def associative_scan(batch, time, channels):
    """`h = a h + b` by torch's own associative scan, compiled."""
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    torch._dynamo.reset()
    f = torch.compile(lambda a, b: scan(combine, (a, b), dim=1, combine_mode="generic")[1])
    shape = (batch, time, channels)
    return passes(f, (torch.sigmoid(torch.randn(shape) + 2), torch.randn(shape)))


def gla_chunk(q, k, v, g, chunk=64):
    """GLA in chunks, all of them at once but for the carried state. It forms `exp(-sum g)`, as the short form of the
    paper does: right for mild gates only."""
    batch, time, heads, key_dim = q.shape
    split = lambda x: x.view(batch, time // chunk, chunk, heads, -1).permute(0, 3, 1, 2, 4)
    q, k, v, total = split(q), split(k), split(v), split(g).cumsum(-2)
    last = total[..., -1:, :]
    read, written = q * total.exp() * key_dim**-0.5, k * torch.exp(-total)
    within = torch.tril(read @ written.mT) @ v
    updates = (k * torch.exp(last - total)).mT @ v
    decays = last.exp().mT
    state = torch.zeros_like(updates[:, :, 0])
    states = []
    for n in range(updates.shape[2]):
        states.append(state)
        state = decays[:, :, n] * state + updates[:, :, n]
    o = within + read @ torch.stack(states, 2)
    return o.permute(0, 2, 3, 1, 4).reshape(batch, time, heads, -1)


def gla(batch, time, heads, key_dim, value_dim):
    key = (batch, time, heads, key_dim)
    gate = F.logsigmoid(torch.randn(key)) / 16
    return passes(gla_chunk, (torch.randn(key), torch.randn(key), torch.randn(batch, time, heads, value_dim), gate))


def delta_inputs(batch, time, heads, key_dim, value_dim):
    unit = lambda *shape: F.normalize(torch.randn(shape), dim=-1)
    return (
        unit(batch, time, heads, key_dim),
        unit(batch, time, heads, key_dim),
        torch.randn(batch, time, heads, value_dim),
        F.logsigmoid(torch.randn(batch, time, heads) + 2),
        torch.rand(batch, time, heads),
    )


def gated_delta_rule(*shape):
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    f = lambda q, k, v, g, beta: torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta)[0]
    return passes(f, delta_inputs(*shape))


def gated_delta_step(*shape):
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    q, k, v, g, beta = delta_inputs(*shape)
    batch, _, heads, key_dim, value_dim = shape
    state = torch.randn(batch, heads, key_dim, value_dim)

    def step():
        with torch.no_grad():
            return torch_recurrent_gated_delta_rule(
                q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True
            )

    return {"step": step}


def rg_lru(batch, time, channels, blocks):
    """Griffin's unit with the block-diagonal products of its gates."""
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    config = RecurrentGemmaConfig(lru_width=channels, hidden_size=channels, num_attention_heads=blocks)
    unit = RecurrentGemmaRglru(config)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.normal_(0, 0.05)
        unit.recurrent_param.sub_(4)
    positions = torch.arange(time).expand(batch, time)

    def f(x):
        unit.recurrent_states = None
        return unit(x, positions)

    return passes(f, (torch.randn(batch, time, channels),), tuple(unit.parameters()))


def attention(batch, time, heads, head_dim):
    f = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return passes(f, tuple(torch.randn(batch, heads, time, head_dim) for _ in range(3)))


def qwen3_next(batch, time):
    """The hybrid of `models/gated_delta_net-3:1` in transformers' Qwen3-Next classes, dense."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    layers = 8
    config = Qwen3NextConfig(
        vocab_size=256,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=layers,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=128,
        layer_types=["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)],
        mlp_only_layers=list(range(layers)),
        num_experts=0,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen3NextForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 256, (batch, time))

    def training_step():
        model.train()
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    def decode():
        model.eval()
        with torch.no_grad():
            return model.generate(ids[:, :16], max_new_tokens=64, do_sample=False)

    decode.calls = 64
    return {"forward+backward": training_step, "step": decode}
