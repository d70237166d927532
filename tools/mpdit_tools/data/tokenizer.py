"""A sentencepiece unigram model trained on the training captions: the same captions give the same file."""

import io
from collections.abc import Sequence

from mpdit.errors import InputError

CAPTIONS = 1_000_000  # more change little and take gigabytes; captions come shuffled, so the first ones are a fair part
BYTES = 65_536  # longer captions are cut; sentencepiece would leave them out without a word


def train_tokenizer(captions: Sequence[str], *, vocab_size: int) -> tuple[bytes, int]:
    """The model file and its number of pieces, which is below ``vocab_size`` when the captions hold fewer.

    Pieces: 0 ``<pad>``, 1 ``</s>``, 2 ``<unk>``, 3 to 258 the bytes, then text. Unseen characters fall back to bytes.
    Raises InputError when ``vocab_size`` has no room for the characters of the captions.
    """
    import sentencepiece

    text = (caption.encode()[:BYTES].decode(errors="ignore") for caption in captions[:CAPTIONS])
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=text,
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            character_coverage=0.9995,
            byte_fallback=True,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            eos_piece="</s>",
            unk_piece="<unk>",
            normalization_rule_name="nmt_nfkc",
            max_sentence_length=BYTES,
            num_threads=1,  # more threads give another model
            hard_vocab_limit=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        told = str(error).strip().splitlines()[-1]
        raise InputError(
            f"--vocab-size {vocab_size}: no tokenizer can be trained on these {len(captions)} captions ({told}); "
            "262 pieces and one for each different character are the least, 2048 is the default."
        ) from error
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    return model.getvalue(), size
