#!/usr/bin/env bash
# sentencepiece 0.2.3 and tokenizers 0.23.3: one normalisation map, two results.
#
# A SentencePiece model (type "unigram", rule nmt_nfkc: T5, XLM-R, ...) carries its normaliser as a
# compiled map, `precompiled_charsmap`. GGUF stores that map, and `tokenizers` has a normaliser
# "Precompiled" that takes it. One expects equal text out of both.
#
# Seen: `tokenizers` cuts the text into grapheme clusters first, and where a cluster's start is in
# the map it puts the replacement in place of the WHOLE cluster: the marks behind it are lost
# (a second accent), and it looks up clusters of at most a few bytes, so that what is longer (two
# Hangul letters, kana with a separate mark) is not composed. SentencePiece matches the longest
# prefix at every byte and keeps what follows.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q sentencepiece==0.2.3 tokenizers==0.23.3 protobuf==7.36.2 2>"$work/pip.log" \
  || { cat "$work/pip.log"; exit 1; }
"$work/venv/bin/python" - 2>/dev/null <<'PY'
import io
import sys

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([f"the quick brown fox {chr(97 + i % 26) * 3}" for i in range(500)]),
    model_writer=model, vocab_size=60, model_type="unigram", normalization_rule_name="nmt_nfkc",
    hard_vocab_limit=False,
)
proto = sentencepiece_model_pb2.ModelProto()
proto.ParseFromString(model.getvalue())
theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
other = tokenizers.normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)

expected = {  # text: (SentencePiece, tokenizers)
    "e\u0301": ("\u00e9", "\u00e9"),
    "a\u0301\u0301": ("\u00e1\u0301", "\u00e1"),
    "a\u0323\u0302": ("\u1ead", "\u1ea1"),
    "\u304b\u3099": ("\u304c", "\u304b\u3099"),
    "\u1100\u1161\u11a8": ("\uac01", "\u1100\u1161\u11a8"),
}
changed = 0
for text, want in expected.items():
    seen = theirs.normalize(text).lstrip("\u2581"), other.normalize_str(text)
    changed += seen != want
    print(f"{text!a:32} sentencepiece {seen[0]!a:18} tokenizers {seen[1]!a:26} "
          f"{'as before' if seen == want else f'CHANGED, was {want!a}'}")
sys.exit(changed > 0)
PY
