"""text-generation: texts and chats go on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemmakit.auto import AutoModelForCausalLM
from gemmakit.errors import InputError, PromptTooLong
from gemmakit.generation.config import refuse_unknown
from gemmakit.generation.settings import DEFAULTS
from gemmakit.pipelines.base import Pipeline, Record, encoding_options, padded
from gemmakit.text.chat import free_variables

DEFAULT_NEW_TOKENS = 256
NO_PLACE = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")

Message = Mapping[str, Any]


class TextGenerationPipeline(Pipeline):
    """Continues texts, and answers chats (lists of {"role": ..., "content": ...}).

    A result is a list of `num_return_sequences` dictionaries: {"generated_text": prompt and continuation}; for a chat,
    all messages with the assistant's new one at the end, which has "reasoning" and "tool_calls" where the model thought
    aloud or called something (`tokenizer.parse_response`). Without max_new_tokens or max_length, up to 256 new tokens,
    fewer where the context ends.

    Arguments of a call:
        return_full_text: False leaves out the prompt; for a chat "generated_text" is then the answer alone.
        return_tensors: {"generated_token_ids": [...]} instead, prompt included.
        clean_up_tokenization_spaces, skip_special_tokens (True): as in `tokenizer.decode`.
        prefix: put in front of every text prompt.
        continue_final_message: go on with a chat's last message; None does so where the assistant said it.
        tools: what a chat's answer may call: functions, or JSON schemas, as in `tokenizer.apply_chat_template`.
        chat_template_kwargs: what else the chat template is told, {"enable_thinking": True} for one that thinks.
        tokenizer_encode_kwargs: further arguments of encoding, a text's or a chat's: {"add_special_tokens": False}.
        stop_sequence: a text or several that end an answer, as generate's stop_strings; they stay in the answer.
        handle_long_generation: "hole" cuts a prompt on its left where it leaves too little room; None refuses.
        streamer: told of the tokens as they come; inputs then run one at a time.
        assistant_model: a loaded draft, or a folder or Hub id to load one from, when the pipeline is made.
        Everything else goes to `model.generate`. What it does not know is refused, and so are scores, for which a
        result has no place.
    """

    task = "text-generation"
    takes = "a text or a chat (a list of {'role': ..., 'content': ...})"
    model_class = AutoModelForCausalLM
    flax_class = "FlaxGemmaForCausalLM"

    def __init__(self, model: Any, tokenizer: Any, **options: Any):
        draft = options.get("assistant_model")
        if isinstance(draft, (str, Path)):
            options["assistant_model"] = AutoModelForCausalLM.from_pretrained(
                draft, dtype=model.dtype, device_map=model.device
            )
        super().__init__(model, tokenizer, **options)

    def __call__(self, text_inputs: Any, **options: Any) -> Any:
        return super().__call__(text_inputs, **options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises InputError for what neither the pipeline nor generate() has, and for what has no place in a result."""
        known = {*inspect.signature(self.run).parameters, *inspect.signature(self.model.generate).parameters}
        for name, value in options.items():
            if name not in known:
                refuse_unknown([name], {*known, *DEFAULTS} - {"batch", "settings"})
            if name in NO_PLACE and value:
                raise InputError(
                    f"{name} is {value!r}, but {self.task} gives texts: call pipe.model.generate(..., {name}=True)."
                )

    def is_one(self, inputs: Any) -> bool:
        return isinstance(inputs, str) or _is_chat(inputs)

    def encode(
        self,
        prompt: str | Sequence[Message],
        *,
        prefix: str = "",
        continue_final_message: bool | None = None,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenizer_encode_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a text or a chat, with exactly one <bos>; the arguments are as in a call.

        Raises InputError for a variable of the template that is not the caller's to set.
        """
        more = encoding_options("tokenizer_encode_kwargs", tokenizer_encode_kwargs)
        if isinstance(prompt, str):
            return list(self.tokenizer(prefix + prompt, **more)["input_ids"])
        goes_on = _goes_on(prompt, continue_final_message)
        rendered = self.tokenizer.apply_chat_template(
            list(prompt),
            tools=tools,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            **free_variables(chat_template_kwargs),
            **more,
        )
        return list(rendered["input_ids"])

    def run(
        self,
        batch: Sequence[str | Sequence[Message]],
        *,
        return_full_text: bool | None = None,
        return_tensors: bool = False,
        return_text: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        skip_special_tokens: bool = True,
        prefix: str = "",
        continue_final_message: bool | None = None,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenizer_encode_kwargs: Mapping[str, Any] | None = None,
        handle_long_generation: str | None = None,
        stop_sequence: str | Sequence[str] | None = None,
        **settings: Any,
    ) -> list[list[Record]]:
        """The results of a batch, in its order; the options are described at the class."""
        if return_tensors and (return_text or return_full_text is not None):
            raise InputError("return_tensors excludes return_text and return_full_text: choose ids or text.")
        asked: dict[str, Any] = dict(
            prefix=prefix, continue_final_message=continue_final_message, tools=tools,
            chat_template_kwargs=chat_template_kwargs, tokenizer_encode_kwargs=tokenizer_encode_kwargs,
        )  # fmt: skip
        rows = [self._fitted(self.encode(p, **asked), handle_long_generation, settings) for p in batch]
        news = self._continue(rows, settings if stop_sequence is None else {**settings, "stop_strings": stop_sequence})
        said = [
            {"prompt_text": prompt, "input_ids": row, "generated_sequence": many}
            for prompt, row, many in zip(batch, rows, news, strict=True)
        ]
        form: dict[str, Any] = dict(
            return_full_text=return_full_text, return_tensors=return_tensors, return_text=return_text,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces, skip_special_tokens=skip_special_tokens,
            prefix=prefix, continue_final_message=continue_final_message, tools=tools,
        )  # fmt: skip
        return [self.postprocess(one, **form) for one in said]

    def preprocess(self, prompt_text: Any, *, handle_long_generation: str | None = None, **options: Any) -> Record:
        """input_ids and attention_mask, (1, P), and the prompt; options as in `encode`, and those of generate()."""
        self.check_options(options)
        known = inspect.signature(self.encode).parameters
        row = self.encode(prompt_text, **{name: value for name, value in options.items() if name in known})
        row = self._fitted(row, handle_long_generation, options)
        return {**self.model_inputs(row), "prompt_text": prompt_text}

    def forward(self, model_inputs: Mapping[str, Any], **settings: Any) -> Record:
        """prompt_text, input_ids (a list) and generated_sequence: the new ids of each continuation, without padding."""
        row = model_inputs["input_ids"][0].tolist()
        news = self._continue([row], settings)[0]
        return {"prompt_text": model_inputs["prompt_text"], "input_ids": row, "generated_sequence": news}

    def postprocess(
        self,
        model_outputs: Mapping[str, Any],
        *,
        return_full_text: bool | None = None,
        return_tensors: bool = False,
        return_text: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        skip_special_tokens: bool = True,
        prefix: str = "",
        continue_final_message: bool | None = None,
        tools: Sequence[Any] | None = None,
    ) -> list[Record]:
        """The continuations of one prompt as a call gives them."""
        prompt, row, news = (model_outputs[n] for n in ("prompt_text", "input_ids", "generated_sequence"))
        if return_tensors:
            return [{"generated_token_ids": row + new} for new in news]

        def answer(prompt: Any, row: list[int], new: list[int]) -> Record:
            if skip_special_tokens and not clean_up_tokenization_spaces and not isinstance(prompt, str):
                return self.tokenizer.parse_response(new, prefix=row, calls=tools is not None)
            text = self.tokenizer.decode(
                new,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            )
            return {"role": "assistant", "content": text}

        def record(prompt: Any, row: list[int], new: list[int]) -> Record:
            said = answer(prompt, row, new)
            if return_full_text in (None, True):
                return {"generated_text": _joined(prompt, said, prefix, continue_final_message)}
            return {"generated_text": said["content"]} | {n: said[n] for n in ("reasoning", "tool_calls") if n in said}

        return [record(prompt, row, new) for new in news]

    def _fitted(self, row: list[int], how: str | None, settings: Mapping[str, Any]) -> list[int]:
        """A prompt that leaves room for its continuation, cut behind <bos> if `how` is "hole"."""
        if how is None:
            return row
        if how != "hole":
            raise InputError(f"handle_long_generation is {how!r}; it must be 'hole' or None.")
        config = (settings.get("generation_config") or self.model.generation_config).updated()
        new = settings.get("max_new_tokens", config.max_new_tokens)
        if new is None:
            longest = settings.get("max_length", config.max_length)
            new = min(DEFAULT_NEW_TOKENS, self._context()) if longest is None else max(longest - len(row), 0)
        kept = self._context() - new
        if kept < 1:
            raise PromptTooLong(
                f"{new} new tokens are asked for and the context holds {self._context()}: nothing of a prompt fits "
                "beside them. Ask for fewer."
            )
        if len(row) <= kept:
            return row
        start = row[:1] if row[0] == self.tokenizer.bos_token_id else []
        return start + row[len(row) - kept + len(start) :]

    def _context(self) -> int:
        return min(self.model.config.max_position_embeddings, self.tokenizer.model_max_length)

    def _continue(self, rows: Sequence[list[int]], settings: dict[str, Any]) -> list[list[list[int]]]:
        """For each row its `num_return_sequences` continuations, without padding."""
        if not rows:
            return []
        settings = {**settings, "tokenizer": self.tokenizer}
        config = (settings.get("generation_config") or self.model.generation_config).updated()
        # Rows with different room run apart, or the longest prompt would shorten the others' answers.
        groups: dict[int | None, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(self.room(len(row), config, settings), []).append(index)
        out: list[list[list[int]]] = [[] for _ in rows]
        for room, members in groups.items():
            limit = {} if room is None else {"max_new_tokens": room}
            alone = settings.get("streamer") is not None
            for group in [[i] for i in members] if alone else [members]:
                for index, news in zip(
                    group, self._generate([rows[i] for i in group], {**settings, **limit}), strict=True
                ):
                    out[index] = news
        return out

    def turn_ends(self) -> dict[str, Any]:
        """The setting that ends a chat's answer at the end of its turn, which some checkpoints do not list."""
        ends = list(self.model.generation_config.eos_token_ids)
        ends += [index for index in self.tokenizer.answer_ends if index not in ends]
        return {"eos_token_id": ends} if ends else {}

    def room(self, prompt: int, config: Any, settings: Mapping[str, Any]) -> int | None:
        """New tokens for a prompt of this length; None where generate() itself knows or has to refuse."""

        def asked(name: str) -> Any:
            return settings.get(name, getattr(config, name))

        if asked("max_new_tokens") is not None:
            return None
        limit = asked("max_length")
        if limit is not None:
            return limit - prompt if isinstance(limit, int) and limit > prompt else None
        context = self.model.config.max_position_embeddings
        if prompt >= context:
            raise PromptTooLong(f"prompt has {prompt} tokens, but the context holds {context}. Shorten the prompt.")
        return min(DEFAULT_NEW_TOKENS, context - prompt)

    def _generate(self, rows: Sequence[list[int]], settings: dict[str, Any]) -> list[list[list[int]]]:
        ids, mask = padded(rows, self.tokenizer.pad_token_id or 0, self.device, "left")
        news: list[list[int]] = []
        for step in self.model.stream_rows(ids, attention_mask=mask, **settings):
            news = news or [[] for _ in step.tokens]
            for new, tokens in zip(news, step.tokens, strict=True):
                new += tokens
        each = len(news) // len(rows)
        return [news[i * each : (i + 1) * each] for i in range(len(rows))]


def _is_chat(inputs: Any) -> bool:
    return isinstance(inputs, (list, tuple)) and bool(inputs) and all(isinstance(m, Mapping) for m in inputs)


def _goes_on(chat: Sequence[Message], asked: bool | None) -> bool:
    return chat[-1].get("role") in ("assistant", "model") if asked is None else asked


def _joined(prompt: str | Sequence[Message], said: Message, prefix: str, goes_on: bool | None) -> Any:
    if isinstance(prompt, str):
        return prefix + prompt + said["content"]
    if _goes_on(prompt, goes_on):
        return [*prompt[:-1], {**said, **prompt[-1], "content": _extended(prompt[-1]["content"], said["content"])}]
    return [*prompt, said]


def _extended(content: Any, text: str) -> Any:
    if isinstance(content, str):
        return content + text
    return [*content[:-1], {**content[-1], "text": content[-1]["text"] + text}]
