use super::*;

#[test]
fn bytes_round_trip_through_the_stream_and_the_file() {
    let text = "déjà vu ⛰ ok";
    let tokenizer = Tokenizer::Bytes(Alphabet::of([text.as_bytes()]));
    let ids = tokenizer.encode("prompt", text.as_bytes()).unwrap();
    let mut decoder = tokenizer.decoder();
    let mut back: String = ids.iter().map(|&id| decoder.push(id)).collect();
    back += &decoder.finish();
    assert_eq!(back, text);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, tokenizer.to_json().unwrap()).unwrap();
    let error = Tokenizer::load(&path).unwrap().encode("prompt", b"do Xu").unwrap_err();
    assert!(error.to_string().starts_with("prompt: byte 0x58 at offset 3"), "{error}");
}

#[test]
fn broken_characters_are_replaced_not_lost() {
    let tokenizer = Tokenizer::bytes();
    let mut decoder = tokenizer.decoder();
    let text: String = [0xff, b'a'.into(), 0xc3].iter().map(|&id| decoder.push(id)).collect();
    assert_eq!(text + &decoder.finish(), "\u{fffd}a\u{fffd}");
}

#[test]
fn a_word_level_tokenizer_refuses_unknown_words() {
    let json = r#"{"version":"1.0","truncation":null,"padding":null,"normalizer":null,"post_processor":null,
        "added_tokens":[{"id":3,"content":"</s>","single_word":false,"lstrip":false,"rstrip":false,
        "normalized":false,"special":true}],"pre_tokenizer":{"type":"Whitespace"},"decoder":null,
        "model":{"type":"WordLevel","vocab":{"[UNK]":0,"to":1,"be":2,"</s>":3},"unk_token":"[UNK]"}}"#;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, json).unwrap();
    let tokenizer = Tokenizer::load(&path).unwrap();
    assert_eq!(tokenizer.vocab_size(), 4);
    assert_eq!(tokenizer.separator(), Some(3));
    assert_eq!(tokenizer.encode("prompt", b"to be").unwrap(), [1, 2]);
    assert!(tokenizer.encode("prompt", b"to go").unwrap_err().to_string().contains("outside the vocabulary"));
    assert!(Tokenizer::load(folder.path()).is_err());
    let mut decoder = tokenizer.decoder();
    assert_eq!([1, 2].map(|id| decoder.push(id)).concat() + &decoder.finish(), "to be");
}

/// Writes `json` (parts over an empty file) as `tokenizer.json` in a new folder.
fn write(parts: serde_json::Value) -> (tempfile::TempDir, std::path::PathBuf) {
    let mut file = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"?": 0, "a": 1, "b": 2, "<end>": 3, "<other>": 4}, "unk_token": "?"},
    });
    for (name, part) in parts.as_object().unwrap() {
        file[name] = part.clone();
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, file.to_string()).unwrap();
    (folder, path)
}

#[test]
fn truncation_padding_and_dropout_are_switched_off_and_told_once() {
    let truncation =
        serde_json::json!({"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0});
    let padding = serde_json::json!({"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "?"});
    let (folder, path) = write(serde_json::json!({"truncation": truncation, "padding": padding}));
    let tokenizer = Tokenizer::load(&path).unwrap();
    assert_eq!(tokenizer.encode("prompt", b"a b").unwrap(), [1, 2]);
    let text = "a b ".repeat(2000);
    assert_eq!(tokenizer.encode_lossy("text", text.as_bytes()).unwrap().len(), 4000);
    let [first, second] = tokenizer.notes() else { panic!("{:?}", tokenizer.notes()) };
    assert!(first.contains("tokenizer.json: its truncation to 8 tokens is switched off"), "{first}");
    assert!(second.contains("tokenizer.json: its padding is switched off"), "{second}");
    // What is saved has neither, and says nothing.
    std::fs::write(folder.path().join("saved.json"), tokenizer.to_json().unwrap()).unwrap();
    let saved = Tokenizer::load(&folder.path().join("saved.json")).unwrap();
    assert_eq!(saved.notes(), [""; 0]);
    assert_eq!(saved.encode_lossy("text", text.as_bytes()).unwrap().len(), 4000);

    let bpe = serde_json::json!({"type": "BPE", "dropout": 0.9, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]});
    let (_folder, path) = write(serde_json::json!({"model": bpe}));
    let tokenizer = Tokenizer::load(&path).unwrap();
    assert_eq!(tokenizer.encode("prompt", "ab ".repeat(100).as_bytes()).unwrap(), [2; 100]);
    assert!(tokenizer.notes()[0].contains("dropout of 0.9"), "{:?}", tokenizer.notes());
}

#[test]
fn unknown_text_is_refused_by_every_model() {
    let vocab = serde_json::json!({"[what]": 0, "a": 1, "b": 2});
    let pieces = serde_json::json!([["a", -1.0], ["b", -1.0], ["[what]", -9.0]]);
    for model in [
        serde_json::json!({"type": "WordLevel", "unk_token": "[what]", "vocab": vocab}),
        serde_json::json!({"type": "WordPiece", "unk_token": "[what]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab}),
        serde_json::json!({"type": "BPE", "unk_token": "[what]", "vocab": vocab, "merges": []}),
        serde_json::json!({"type": "Unigram", "unk_id": 2, "vocab": pieces}),
        // Without an unknown token BPE leaves out what it does not know.
        serde_json::json!({"type": "BPE", "vocab": vocab, "merges": []}),
    ] {
        let (_folder, path) = write(serde_json::json!({"model": model}));
        let tokenizer = Tokenizer::load(&path).unwrap();
        assert_eq!(tokenizer.encode("prompt", b"a b a").unwrap().len(), 3, "{model}");
        for text in ["a c", "c a", "é", "a éb a"] {
            let refused = tokenizer.encode("prompt", text.as_bytes());
            let error = refused.expect_err(&format!("{model} accepts {text}")).to_string();
            assert!(error.starts_with("prompt: ") && error.contains("vocabulary"), "{error}");
            assert!(tokenizer.encode_lossy("text", text.as_bytes()).is_ok());
        }
    }
    let model = serde_json::json!({"type": "Unigram", "unk_id": null, "vocab": pieces});
    let (_folder, path) = write(serde_json::json!({"model": model}));
    let error = Tokenizer::load(&path).unwrap().encode("prompt", b"c").unwrap_err();
    assert!(error.to_string().starts_with("prompt: cannot be tokenized"), "{error}");
}

#[test]
fn a_separator_is_taken_from_the_files_beside() {
    for (name, config, separator) in [
        ("tokenizer_config.json", r#"{"eos_token": "<end>"}"#, Some(3)),
        ("tokenizer_config.json", r#"{"eos_token": {"content": "<end>", "special": true}}"#, Some(3)),
        ("tokenizer_config.json", r#"{"eos_token": null}"#, None),
        ("generation_config.json", r#"{"eos_token_id": 4}"#, Some(4)),
        ("generation_config.json", r#"{"eos_token_id": [77, 3, 4]}"#, Some(3)),
        ("generation_config.json", r#"{"eos_token_id": null}"#, None),
    ] {
        let (folder, path) = write(serde_json::json!({}));
        assert_eq!(Tokenizer::load(&path).unwrap().separator(), None);
        std::fs::write(folder.path().join(name), config).unwrap();
        let tokenizer = Tokenizer::load(&path).unwrap();
        assert_eq!(tokenizer.separator(), separator, "{config}");
        assert_eq!(tokenizer.notes(), [""; 0]);
        assert_eq!(tokenizer.config_json().is_some(), separator.is_some());
    }
    for (name, config, note) in [
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", r#"{"eos_token": "<none>"}"#, "eos_token `<none>` is not in the vocabulary"),
        ("generation_config.json", r#"{"eos_token_id": [77]}"#, "eos_token_id [77] is not in the vocabulary"),
    ] {
        let (folder, path) = write(serde_json::json!({}));
        std::fs::write(folder.path().join(name), config).unwrap();
        let tokenizer = Tokenizer::load(&path).unwrap();
        assert_eq!(tokenizer.separator(), None);
        assert!(tokenizer.notes()[0].contains(note), "{:?}", tokenizer.notes());
    }
}
