use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Map, Value, json};

use super::*;
use crate::data::rng;

/// A tokenizer of the file that `parts` are put into.
fn tokenizer(parts: Value) -> Tokenizer {
    let mut file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
    });
    let (Value::Object(all), Value::Object(parts)) = (&mut file, parts) else { unreachable!() };
    all.extend(parts);
    let inner = tokenizers::Tokenizer::from_bytes(file.to_string()).unwrap();
    Tokenizer::HuggingFace(Box::new(inner.into()))
}

/// Ids from 0 on.
fn vocab<S: ToString>(tokens: impl IntoIterator<Item = S>) -> Map<String, Value> {
    tokens.into_iter().enumerate().map(|(id, token)| (token.to_string(), json!(id))).collect()
}

fn added(id: usize, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": false, "special": special})
}

/// All bytes, some words, and a token that ends within a character.
fn byte_level(decoder: Value) -> Tokenizer {
    let spelt =
        |byte: u8| char::from_u32((0..0x144).find(|&c| spelt_byte(char::from_u32(c).unwrap()) == Some(byte)).unwrap());
    let bytes = (0..=255).map(|byte| spelt(byte).unwrap().to_string());
    let merged = ["Ġt", "he", "Ġthe", "Ã©", "ä¸", "Ġð"].map(str::to_owned);
    tokenizer(json!({
        "added_tokens": [added(262, "<|endoftext|>", true), added(263, "<|é|>", false)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": decoder,
        "model": {"type": "BPE", "vocab": vocab(bytes.chain(merged)),
                  "merges": ["Ġ t", "h e", "Ġt he", "Ã ©", "ä ¸", "Ġ ð"]},
    }))
}

fn byte_level_decoder() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true})
}

/// Byte fallback as in Llama's file, with a space before the text, or in Gemma's, without.
fn byte_fallback(prefix: bool) -> Tokenizer {
    let special = ["<unk>", "<s>", "</s>"].map(str::to_owned);
    let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
    let words = ["▁", "t", "h", "e", "c", "a", "s", "▁t", "▁th", "▁the", "at", "▁c", "▁cat"].map(str::to_owned);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    let normalizer = if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]})
    } else {
        replace
    };
    tokenizer(json!({
        "added_tokens": [added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true)],
        "normalizer": normalizer,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
                  "vocab": vocab(special.into_iter().chain(bytes).chain(words)),
                  "merges": ["▁ t", "▁t h", "▁th e", "a t", "▁ c", "▁c at"]},
    }))
}

fn metaspace() -> Tokenizer {
    let space = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let pieces = ["<pad>", "[UNKNOWN]", "▁", "▁the", "the", "▁cat", "▁sat", "s", "a", "t", "é", "世", "\u{fffd}"];
    let pieces: Vec<Value> = pieces.iter().enumerate().map(|(id, piece)| json!([piece, -(id as f64)])).collect();
    tokenizer(json!({
        "pre_tokenizer": space, "decoder": space,
        "model": {"type": "Unigram", "unk_id": 1, "vocab": pieces, "byte_fallback": false},
    }))
}

fn word_piece() -> Tokenizer {
    let words = ["[UNK]", "the", "play", "##ing", "##s", "'", "s", "m", ".", ",", "do", "not", "##é", "世", "##", "t"];
    tokenizer(json!({
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab(words)},
    }))
}

fn word_suffix() -> Tokenizer {
    let words = ["<unk>", "t", "h", "e", "t</w>", "h</w>", "e</w>", "th", "the</w>", "é</w>", "世", "世</w>"];
    tokenizer(json!({
        "pre_tokenizer": {"type": "Whitespace"},
        "decoder": {"type": "BPEDecoder", "suffix": "</w>"},
        "model": {"type": "BPE", "unk_token": "<unk>", "end_of_word_suffix": "</w>", "vocab": vocab(words),
                  "merges": ["t h", "th e</w>"]},
    }))
}

fn words(decoder: Value) -> Tokenizer {
    let words = ["<pad>", "|", "h", "e", "l", "o", "'", "é", "\u{fffd}", "?"];
    tokenizer(json!({
        "pre_tokenizer": {"type": "Whitespace"}, "decoder": decoder,
        "model": {"type": "WordLevel", "unk_token": "?", "vocab": vocab(words)},
    }))
}

fn kinds() -> Vec<(&'static str, Tokenizer)> {
    let replace = json!({"type": "Replace", "pattern": {"String": "t"}, "content": "T"});
    let chain = json!({"type": "Sequence", "decoders": [byte_level_decoder(), replace]});
    let ctc = json!({"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true});
    vec![
        ("byte-level", byte_level(byte_level_decoder())),
        ("byte-level in a chain", byte_level(chain)),
        ("byte fallback, Llama", byte_fallback(true)),
        ("byte fallback, Gemma", byte_fallback(false)),
        ("Metaspace", metaspace()),
        ("WordPiece", word_piece()),
        ("word suffix", word_suffix()),
        ("CTC", words(ctc)),
        ("no decoder", words(Value::Null)),
    ]
}

/// The pieces of a stream and its end.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut decoder = tokenizer.decoder();
    ids.iter().map(|&id| decoder.push(id)).collect::<String>() + &decoder.finish()
}

fn decoded(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    if ids.iter().all(|&id| super::token(hugging_face(tokenizer), id).is_none()) {
        return String::new(); // what some decoders cannot do
    }
    hugging_face(tokenizer).decode(ids, true).unwrap()
}

fn hugging_face(tokenizer: &Tokenizer) -> &HuggingFace {
    let Tokenizer::HuggingFace(inner) = tokenizer else { unreachable!() };
    inner
}

/// Whether `ids` end, or go on to another token, in the middle of a character of byte-fallback tokens.
fn breaks_a_character(tokenizer: &Tokenizer, ids: &[u32]) -> bool {
    let tokens = ids.iter().filter_map(|&id| super::token(hugging_face(tokenizer), id));
    let bytes: Vec<Option<u8>> = tokens.map(|token| fallback_byte(&token)).collect();
    let mut runs = bytes.split(Option::is_none);
    runs.any(|run| std::str::from_utf8(&run.iter().flatten().copied().collect::<Vec<_>>()).is_err())
}

fn random_text(rng: &mut StdRng) -> String {
    const POOL: [&str; 20] = [
        " ", " ", "  ", "\n", "the", " the", "cat", " sat", "a", "t", "é", "déjà", "世", "界", "😀", "\u{fffd}", "▁",
        "'s", "\u{0}", ".",
    ];
    (0..rng.random_range(0..40)).map(|_| POOL[rng.random_range(0..POOL.len())]).collect()
}

#[test]
fn a_stream_is_the_decoding_of_all_ids_wherever_it_is_cut() {
    let mut rng = rng(21, 0);
    for (name, tokenizer) in kinds() {
        for _ in 0..60 {
            let ids = tokenizer.encode_lossy("text", random_text(&mut rng).as_bytes()).unwrap();
            assert_eq!(streamed(&tokenizer, &ids), decoded(&tokenizer, &ids), "{name}: {ids:?}");
            // A prompt, then what follows it; and a stream that ends there.
            let cut = rng.random_range(0..=ids.len());
            let mut decoder = tokenizer.decoder();
            let prompt: String = ids[..cut].iter().map(|&id| decoder.push(id)).collect();
            let more: String = ids[cut..].iter().map(|&id| decoder.push(id)).collect();
            assert_eq!(prompt + &more + &decoder.finish(), decoded(&tokenizer, &ids), "{name}: {ids:?} at {cut}");
            if !breaks_a_character(&tokenizer, &ids[..cut]) {
                assert_eq!(
                    streamed(&tokenizer, &ids[..cut]),
                    decoded(&tokenizer, &ids[..cut]),
                    "{name}: {ids:?} to {cut}"
                );
            }
        }
    }
}

#[test]
fn a_stream_of_any_ids_is_their_decoding() {
    let mut rng = rng(22, 0);
    let mut compared = 0;
    for (name, tokenizer) in kinds() {
        let vocab = tokenizer.vocab_size() as u32;
        for round in 0..200 {
            // Ids above the vocabulary are skipped; the few of half the rounds repeat.
            let top = if round % 2 == 0 { vocab + 2 } else { vocab.min(300) };
            let low = if round % 2 == 0 { 0 } else { top.saturating_sub(14) };
            let ids: Vec<u32> = (0..rng.random_range(1..120)).map(|_| rng.random_range(low..top)).collect();
            if !breaks_a_character(&tokenizer, &ids) {
                compared += 1;
                assert_eq!(streamed(&tokenizer, &ids), decoded(&tokenizer, &ids), "{name}: {ids:?}");
            }
        }
    }
    assert!(compared > 1400, "{compared}");
}

#[test]
fn one_token_a_byte_loses_no_character() {
    let byte_level = byte_level(byte_level_decoder());
    let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
    let fallback = byte_fallback(true);
    let fallback_bytes = |text: &str| text.bytes().map(|byte| 3 + u32::from(byte)).collect::<Vec<_>>();
    let han: String = ('\u{4e00}'..).take(120).collect();
    for text in ["déjà vu, où ça? ".repeat(20), han, "😀".repeat(50), "\u{fffd}".repeat(90)] {
        assert_eq!(streamed(&Tokenizer::bytes(), &bytes(&text)), text);
        assert_eq!(streamed(&byte_level, &bytes(&text)), text);
        assert_eq!(streamed(&fallback, &fallback_bytes(&text)), text);
        // Every character comes with its last byte.
        let mut decoder = fallback.decoder();
        let pieces: Vec<String> = fallback_bytes(&text).iter().map(|&id| decoder.push(id)).collect();
        assert_eq!(pieces.iter().filter(|piece| !piece.is_empty()).count(), text.chars().count());
    }
}

#[test]
fn the_end_of_a_stream_is_given_out() {
    let cut = |text: &str, first: u32| {
        let mut ids: Vec<u32> = text.bytes().map(|byte| first + u32::from(byte)).collect();
        ids.pop();
        ids
    };
    assert_eq!(streamed(&Tokenizer::bytes(), &cut("ab世", 0)), "ab\u{fffd}");
    assert_eq!(streamed(&byte_level(byte_level_decoder()), &cut("ab世", 0)), "ab\u{fffd}");
    // A byte of byte fallback is a replacement character each.
    let fallback = byte_fallback(true);
    let whole = [vec![264, 263], cut("世", 3)].concat();
    assert_eq!(streamed(&fallback, &whole), "ac\u{fffd}\u{fffd}");
    assert_eq!(decoded(&fallback, &whole), "ac\u{fffd}\u{fffd}");
    // What was whole and given out stays; what follows is whole again, with its space.
    let broken = [cut("世界", 3), vec![268], cut("é", 3), vec![3 + 0x20, 268]].concat();
    assert_eq!(streamed(&fallback, &broken), "世\u{fffd}\u{fffd} the\u{fffd}  the");
    let broken = [cut("é", 3), cut("世x", 3), vec![268]].concat();
    assert_eq!(streamed(&fallback, &broken), "\u{fffd}世 the");
    for (name, tokenizer) in kinds() {
        let Some(id) = tokenizer.encode_lossy("text", "\u{fffd}".as_bytes()).ok().filter(|ids| !ids.is_empty()) else {
            continue;
        };
        assert_eq!(streamed(&tokenizer, &id), decoded(&tokenizer, &id), "{name}");
        assert!(tokenizer.decoder().finish().is_empty(), "{name}");
    }
}

#[test]
fn what_follows_a_prompt_is_decoded_as_its_continuation() {
    for (tokenizer, text, whole) in [
        (metaspace(), "the cat sat", "the cat sat"),
        (byte_fallback(true), "the cat", "the cat"),
        (word_piece(), "the playing", "the playing"),
        (word_piece(), "the playing , do not.", "the playing, do not."),
        (word_suffix(), "the the", "the the"),
    ] {
        let ids = tokenizer.encode("prompt", text.as_bytes()).unwrap();
        for cut in 0..=ids.len() {
            let mut decoder = tokenizer.decoder();
            let prompt: String = ids[..cut].iter().map(|&id| decoder.push(id)).collect();
            let stream: String = ids[cut..].iter().map(|&id| decoder.push(id)).collect();
            assert_eq!(prompt + &stream + &decoder.finish(), whole);
        }
    }
}

#[test]
fn no_stream_grows() {
    for (name, tokenizer) in kinds() {
        for id in 0..tokenizer.vocab_size() as u32 + 1 {
            let mut decoder = tokenizer.decoder();
            for _ in 0..300 {
                decoder.push(id);
            }
            let held = match &decoder.0 {
                Kind::Bytes(characters) | Kind::ByteLevel(_, characters) => characters.pending.len(),
                Kind::Window(window) => window.ids.len().max(window.pending.0.len()),
            };
            let most = if name == "byte-level in a chain" { 9 * CONTEXT } else { 2 * CONTEXT + 4 };
            assert!(held <= most, "{name}: {held} ids held after 300 of {id}");
        }
    }
}

#[test]
fn bytes_are_spelt_as_the_crate_does() {
    let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
    let mut bytes: Vec<u8> = alphabet.iter().map(|&character| spelt_byte(character).unwrap()).collect();
    bytes.sort_unstable();
    assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    assert_eq!(('\0'..='\u{400}').filter_map(spelt_byte).count(), 256);
    for text in ["a b\n\u{0}é世😀\u{ad}", " \t"] {
        let tokenizer = byte_level(byte_level_decoder());
        let ids = tokenizer.encode("text", text.as_bytes()).unwrap();
        assert_eq!(decoded(&tokenizer, &ids), text);
        assert_eq!(streamed(&tokenizer, &ids), text);
    }
}
