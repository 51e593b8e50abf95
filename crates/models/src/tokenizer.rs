//! Text to tokens and back: bytes, or a Hugging Face `tokenizer.json`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Marks where a document starts in [`Tokenizer::Bytes`]: the id after the 256 bytes.
pub const BYTE_SEPARATOR: u32 = 256;

/// Tokens that published tokenizers use to separate documents, in order of preference.
const SEPARATORS: [&str; 8] =
    ["<|endoftext|>", "<|end_of_text|>", "<|eot|>", "</s>", "<eos>", "<|im_end|>", "[SEP]", "<|eos|>"];

/// How text becomes token ids.
#[derive(Debug, Clone)]
pub enum Tokenizer {
    /// One token per byte, ids 0 to 255, and [`BYTE_SEPARATOR`].
    Bytes(Alphabet),
    /// A tokenizer in Hugging Face's format.
    HuggingFace(Box<tokenizers::Tokenizer>),
}

/// The bytes that a byte model has been trained on. What it says about others is noise, so prompts with them are
/// refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alphabet {
    /// In increasing order.
    bytes: Vec<u8>,
}

const BYTES_FORMAT: &str = "thalweg-bytes";

/// The file of a byte tokenizer.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedBytes {
    format: String,
    bytes: Vec<u8>,
}

impl Alphabet {
    /// All 256 bytes.
    pub fn all() -> Self {
        Self { bytes: (0..=255).collect() }
    }

    /// The bytes that occur in `texts`.
    pub fn of<'a>(texts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut seen = [false; 256];
        for byte in texts.into_iter().flatten() {
            seen[usize::from(*byte)] = true;
        }
        Self { bytes: (0..=255).filter(|&byte| seen[usize::from(byte)]).collect() }
    }

    /// Whether `byte` is one of them.
    pub fn contains(&self, byte: u8) -> bool {
        self.bytes.binary_search(&byte).is_ok()
    }
}

impl Tokenizer {
    /// The byte tokenizer with all bytes allowed.
    pub fn bytes() -> Self {
        Self::Bytes(Alphabet::all())
    }

    /// Reads a `tokenizer.json`: Hugging Face's format, or what [`to_json`](Self::to_json) gives for bytes.
    ///
    /// # Errors
    /// If the file cannot be read or is neither.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        if let Ok(SavedBytes { format, mut bytes }) = serde_json::from_slice(&bytes)
            && format == BYTES_FORMAT
        {
            bytes.sort_unstable();
            return Ok(Self::Bytes(Alphabet { bytes }));
        }
        let tokenizer = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| {
            Error::argument("tokenizer", format!("{} is not a tokenizer.json: {error}", path.display()))
        })?;
        Ok(Self::HuggingFace(Box::new(tokenizer)))
    }

    /// The text of a file that [`load`](Self::load) reads.
    ///
    /// # Errors
    /// If the tokenizer cannot be written as JSON.
    pub fn to_json(&self) -> Result<String> {
        let bad = |error: String| Error::argument("tokenizer", error);
        match self {
            Self::Bytes(Alphabet { bytes }) => {
                let saved = SavedBytes { format: BYTES_FORMAT.to_owned(), bytes: bytes.clone() };
                serde_json::to_string(&saved).map_err(|error| bad(error.to_string()))
            }
            Self::HuggingFace(tokenizer) => tokenizer.to_string(false).map_err(|error| bad(error.to_string())),
        }
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Bytes(_) => BYTE_SEPARATOR as usize + 1,
            // Ids may have gaps, so this is not the number of tokens.
            Self::HuggingFace(tokenizer) => {
                tokenizer.get_vocab(true).values().max().map_or(0, |&largest| largest as usize + 1)
            }
        }
    }

    /// The token that separates documents, if there is one.
    pub fn separator(&self) -> Option<u32> {
        match self {
            Self::Bytes(_) => Some(BYTE_SEPARATOR),
            Self::HuggingFace(tokenizer) => SEPARATORS.iter().find_map(|token| tokenizer.token_to_id(token)),
        }
    }

    /// The tokens of `text`, for training: unknown parts become the tokenizer's unknown token.
    ///
    /// # Errors
    /// If the tokenizer needs UTF-8 and `text` is not.
    pub fn encode_lossy(&self, argument: &'static str, text: &[u8]) -> Result<Vec<u32>> {
        match self {
            Self::Bytes(_) => Ok(text.iter().map(|&byte| u32::from(byte)).collect()),
            Self::HuggingFace(tokenizer) => hugging_face_ids(tokenizer, argument, text),
        }
    }

    /// The tokens of `text`. `argument` names it in errors.
    ///
    /// # Errors
    /// If a part of the text is outside the vocabulary, or if the tokenizer needs UTF-8 and `text` is not.
    pub fn encode(&self, argument: &'static str, text: &[u8]) -> Result<Vec<u32>> {
        let tokenizer = match self {
            Self::Bytes(alphabet) => {
                if let Some(at) = text.iter().position(|&byte| !alphabet.contains(byte)) {
                    let byte = text[at];
                    return Err(Error::argument(
                        argument,
                        format!(
                            "byte 0x{byte:02x} at offset {at} is outside the vocabulary: the training text has none"
                        ),
                    ));
                }
                return Ok(text.iter().map(|&byte| u32::from(byte)).collect());
            }
            Self::HuggingFace(tokenizer) => tokenizer,
        };
        let ids = hugging_face_ids(tokenizer, argument, text)?;
        let unknown = unknown_token(tokenizer).and_then(|token| tokenizer.token_to_id(&token));
        if let Some(at) = ids.iter().position(|&id| Some(id) == unknown) {
            return Err(Error::argument(
                argument,
                format!("token {at} is outside the vocabulary (the tokenizer calls it unknown)"),
            ));
        }
        if ids.is_empty() && !text.is_empty() {
            return Err(Error::argument(argument, "nothing in it is in the tokenizer's vocabulary"));
        }
        Ok(ids)
    }

    /// Turns a stream of ids back into text.
    pub fn decoder(&self) -> Decoder<'_> {
        Decoder { tokenizer: self, pending: Vec::new(), ids: Vec::new(), printed: 0 }
    }
}

fn hugging_face_ids(tokenizer: &tokenizers::Tokenizer, argument: &'static str, text: &[u8]) -> Result<Vec<u32>> {
    let text = std::str::from_utf8(text)
        .map_err(|error| Error::argument(argument, format!("is not UTF-8, which the tokenizer needs: {error}")))?;
    let encoding = tokenizer
        .encode_fast(text, false)
        .map_err(|error| Error::argument(argument, format!("cannot be tokenized: {error}")))?;
    Ok(encoding.get_ids().to_vec())
}

fn unknown_token(tokenizer: &tokenizers::Tokenizer) -> Option<String> {
    use tokenizers::ModelWrapper;
    match tokenizer.get_model() {
        ModelWrapper::BPE(model) => model.unk_token.clone(),
        ModelWrapper::WordPiece(model) => Some(model.unk_token.clone()),
        ModelWrapper::WordLevel(model) => Some(model.unk_token.clone()),
        ModelWrapper::Unigram(_) => Some("<unk>".to_owned()),
    }
}

/// Decodes ids one by one, giving out text as soon as it is certain.
#[derive(Debug)]
pub struct Decoder<'a> {
    tokenizer: &'a Tokenizer,
    /// Bytes that are the start of a character.
    pending: Vec<u8>,
    /// Ids whose text could still change with the next one.
    ids: Vec<u32>,
    /// Bytes of the text of `ids` that were given out.
    printed: usize,
}

/// Ids that are decoded together. What a token looks like may depend on its neighbours (spaces, bytes of one
/// character), never on ones this far away, so that memory stays constant.
const DECODE_WINDOW: usize = 64;

impl Decoder<'_> {
    /// The text that `id` completes; may be empty.
    pub fn push(&mut self, id: u32) -> String {
        match self.tokenizer {
            Tokenizer::Bytes(_) => match u8::try_from(id) {
                Ok(byte) => {
                    self.pending.push(byte);
                    self.take(false)
                }
                Err(_) => self.take(true),
            },
            Tokenizer::HuggingFace(tokenizer) => {
                self.ids.push(id);
                let text = tokenizer.decode(&self.ids, true).unwrap_or_default();
                // A replacement character at the end is a character whose bytes have not all come.
                if text.ends_with(char::REPLACEMENT_CHARACTER) && self.ids.len() < DECODE_WINDOW {
                    return String::new();
                }
                let new = text.get(self.printed..).unwrap_or_default().to_owned();
                self.printed = text.len();
                if self.ids.len() >= DECODE_WINDOW {
                    self.ids.drain(..DECODE_WINDOW / 2);
                    self.printed = tokenizer.decode(&self.ids, true).unwrap_or_default().len();
                }
                new
            }
        }
    }

    /// The text that is left at the end.
    pub fn finish(&mut self) -> String {
        self.take(true)
    }

    /// The complete characters of `pending`; bytes that cannot start a character become replacement characters, as do
    /// incomplete ones at the `end`.
    fn take(&mut self, end: bool) -> String {
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let (valid, rest) = self.pending.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    let bad = match error.error_len() {
                        Some(length) => length,
                        None if end => rest.len(),
                        None => {
                            self.pending = rest.to_vec();
                            return text;
                        }
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending = rest[bad..].to_vec();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
        assert_eq!([1, 2].map(|id| decoder.push(id)).concat(), "to be");
    }
}
