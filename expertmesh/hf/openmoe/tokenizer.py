"""OpenMoE's tokenizer: umT5's SentencePiece with rules of its own."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from transformers import AddedToken, SentencePieceBackend

from expertmesh.errors import UserError, require

DEFAULT_SYSTEM = "You are a helpful, respectful and honest assistant."
"""What a chat begins with unless it has a system message of its own."""

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    f"{{{{- '<<SYS>>\\n{DEFAULT_SYSTEM}\\n<</SYS>>\\n\\n' -}}}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{{- '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' -}}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '<s>[INST] ' + message['content'] + ' [/INST]' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- ' ' + message['content'] + ' </s>' -}}"
    "{%- else -%}"
    "{{- raise_exception('role must be system, user or assistant, got ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

_NUM_SENTINELS = 300
_END = "</s>"


class OpenMoeTokenizer(SentencePieceBackend):
    """umT5's 256,000 pieces and 300 sentinels, as OpenMoE reads text.

    A text begins with id 0, which is also padding, and has no end mark; batches are padded on the
    left, and the attention mask is 1 on the first token. ``<pad>``, ``<unk>`` and
    ``<extra_id_N>`` in a text are those tokens. ``<s>`` and ``</s>`` within a text are text: the
    training code encoded whole conversations by SentencePiece alone, which never gives the
    control pieces of these names, and the models write ``</s>`` in three tokens accordingly.

    Args:
        vocab_file: ``spiece.model``.
        extra_ids: Number of sentinels behind the pieces, the last piece's first.
        kwargs: transformers' own. What a folder says about special tokens, sides and added marks
            is not taken from there: these rules are the tokenizer's.

    Raises:
        UserError: If there is no vocabulary.
    """

    vocab_files_names = {"vocab_file": "spiece.model"}  # noqa: RUF012  (transformers' attribute)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self, vocab_file: str | None = None, extra_ids: int = _NUM_SENTINELS, **kwargs: Any
    ) -> None:
        require("sentencepiece", extra="hf")
        if vocab_file is None:
            raise UserError(
                "OpenMoE's tokenizer needs umT5's spiece.model in its folder; "
                "`expertmesh data fetch tokenizer-umt5` fetches one"
            )
        for name in _RULED:
            kwargs.pop(name, None)
        kwargs.setdefault("chat_template", CHAT_TEMPLATE)
        sentinels = [f"<extra_id_{number}>" for number in reversed(range(extra_ids))]
        super().__init__(
            vocab_file=vocab_file,
            extra_ids=extra_ids,
            bos_token=_special("<pad>"),
            eos_token=_special(_END),
            unk_token=_special("<unk>"),
            pad_token=_special("<pad>"),
            extra_special_tokens=[_special(name) for name in sentinels],
            padding_side="left",
            special_tokens_pattern="prefix_suffix",
            **kwargs,
        )
        # What the pattern puts first; behind a text it puts nothing.
        self.prefix_tokens = [self.pad_token_id]

    def _update_trie(self, unique_no_split_tokens: list[str] | None = None) -> None:
        """Called by transformers to note which tokens a text is split at."""
        for token in (*self._added_tokens_encoder, *(unique_no_split_tokens or ())):
            if token != _END:
                self.tokens_trie.add(token)

    def tokenize(  # type: ignore[override]  # the base of tokenizers in Python has these
        self, text: str, **kwargs: Any
    ) -> list[str]:
        """Pieces and special tokens of a text.

        Args:
            text: "?" takes the place of a lone surrogate, as in the text that models train on.
            kwargs: transformers' own.
        """
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        parts = self.tokens_trie.split(text)
        # transformers looks at all parts for special tokens again, not at those it split at alone.
        if _END not in parts:
            return list(super().tokenize(text, **kwargs))
        found: list[str] = []
        for part in parts:
            found += self._tokenize(part) if part == _END else super().tokenize(part, **kwargs)
        return found

    def _convert_id_to_token(self, index: int) -> str:
        """Called by transformers; the model has more ids than there are pieces and sentinels."""
        return str(super()._convert_id_to_token(index) if index < self.vocab_size else "<unk>")

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Text of pieces; special tokens stay as they are written.

        SentencePiece joins the pieces itself: a character without a piece is several bytes.
        """
        special = self._added_tokens_encoder.keys()
        return "".join(
            "".join(run) if is_special else str(self.sp_model.decode_pieces(list(run)))
            for is_special, run in groupby(tokens, special.__contains__)
        )

    def apply_chat_template(  # type: ignore[override]  # what concerns ids is the tokenizer's
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """OpenMoE's prompt, as text or as what the model reads: ids that begin with id 0.

        Args:
            conversation: Messages with ``role`` (system, user, assistant) and ``content``, or a
                list of such lists.
            tools: The template knows none.
            documents: Nor these.
            chat_template: Another template.
            add_generation_prompt: Changes nothing: an answer follows its question directly.
            continue_final_message: As in transformers.
            tokenize: Ids instead of text.
            return_dict: Ids with their attention mask.
            kwargs: Of the tokenizer, such as ``padding`` and ``return_tensors``, if ids are
                wanted; of the template otherwise.
        """
        text = super().apply_chat_template(
            conversation,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **({} if tokenize else kwargs),
        )
        if not tokenize:
            return text
        encoded = self(text, **kwargs)
        return encoded if return_dict else encoded["input_ids"]


# Rules that a folder's configuration does not change. Real umT5 files mark <s> as special.
_RULED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "additional_special_tokens",
    "extra_special_tokens",
    "added_tokens_decoder",
    "padding_side",
    "special_tokens_pattern",
    "add_bos_token",
    "add_eos_token",
)


def _special(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)
