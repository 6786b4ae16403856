"""Ask an OpenMoE model that does not fit one GPU: over several, with the rest in RAM or on disk.

By what each device may hold; modules fill the GPUs first, then RAM, then the disk:

    python inference_on_multi_devices.py --model openmoe-34b \\
        --max-memory 0=38GiB,1=38GiB,cpu=50GiB --offload-folder offload

Or by naming what goes where, in the published names:

    python inference_on_multi_devices.py --model openmoe-8b-chat --offload-folder offload \\
        --device-map '{"": 0, "model.layers.5.mlp.experts": "cpu", "lm_head": "disk"}'

The numbers are the same wherever the weights lie; what lies in RAM or on disk is brought to the
first GPU for each token, which takes as long as reading it does.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList

import expertmesh.hf  # noqa: F401  # the Auto classes know OpenMoE after this
from expertmesh.hf import StopAtEndOfAnswer


def main(argv: Sequence[str] | None = None) -> None:
    """Load, ask, print."""
    args = parse(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=getattr(torch, args.dtype),
        device_map=args.device_map,
        max_memory=args.max_memory,
        offload_folder=args.offload_folder,
    )
    for name, device in getattr(model, "hf_device_map", {"all": model.device}).items():
        print(f"{device!s:>6}  {name}")

    prompt = args.question
    if not args.no_chat:
        message = {"role": "user", "content": args.question}
        prompt = tokenizer.apply_chat_template([message], tokenize=False)
    # A model that is whole on one GPU has no hooks that would bring the ids there. Weights on disk
    # are on no device, and the CPU does where all of them are.
    devices = (weight.device for weight in model.parameters())
    device = next((device for device in devices if device.type != "meta"), "cpu")
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    num_prompt = inputs["input_ids"].shape[1]
    answer = model.generate(
        **inputs,
        max_new_tokens=args.max_new_tokens,
        do_sample=args.temperature > 0,
        temperature=args.temperature or None,
        stopping_criteria=StoppingCriteriaList([StopAtEndOfAnswer(num_prompt)]),
    )
    print(tokenizer.decode(answer[0, num_prompt:], skip_special_tokens=True).split("</s>")[0])
    for index in range(torch.cuda.device_count()):
        print(f"GPU {index}: {torch.cuda.max_memory_allocated(index) / 2**30:.1f} GiB at most")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument(
        "--question",
        default="What is the title of the last Harry Potter novel, published in 2007?",
    )
    parser.add_argument("--no-chat", action="store_true", help="give the question as it is")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument(
        "--device-map", type=device_map, default="auto", help="auto, or JSON of names to devices"
    )
    parser.add_argument("--max-memory", type=memory, help="such as 0=38GiB,cpu=50GiB,disk=200GiB")
    parser.add_argument("--offload-folder", help="where weights on disk are written")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest")
    return parser.parse_args(argv)


def device_map(text: str) -> str | dict[str, int | str]:
    """``auto``, or a JSON object."""
    return dict(json.loads(text)) if text.startswith("{") else text


def memory(text: str) -> dict[int | str, str]:
    """``0=38GiB,cpu=50GiB`` as accelerate takes it."""
    pairs = (entry.split("=") for entry in text.split(","))
    return {int(device) if device.isdigit() else device: size for device, size in pairs}


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
