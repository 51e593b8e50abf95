//! Text to tokens and back: bytes, or a Hugging Face `tokenizer.json`.

mod decoder;
mod hugging_face;

pub use decoder::Decoder;
pub use hugging_face::HuggingFace;
pub(crate) use hugging_face::TOKENIZER_CONFIG;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Marks where a document starts in [`Tokenizer::Bytes`]: the id after the 256 bytes.
pub const BYTE_SEPARATOR: u32 = 256;

/// How text becomes token ids.
#[derive(Debug, Clone)]
pub enum Tokenizer {
    /// One token per byte, ids 0 to 255, and [`BYTE_SEPARATOR`].
    Bytes(Alphabet),
    /// A tokenizer in Hugging Face's format.
    HuggingFace(Box<HuggingFace>),
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

    /// Reads a `tokenizer.json`: Hugging Face's format, or what [`to_json`](Self::to_json) gives for bytes. What of the
    /// file is not followed is told by [`notes`](Self::notes).
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
        HuggingFace::read(path, &bytes).map(|tokenizer| Self::HuggingFace(Box::new(tokenizer)))
    }

    /// What of its file the tokenizer does not follow, a sentence each, for a user to see once.
    pub fn notes(&self) -> &[String] {
        match self {
            Self::Bytes(_) => &[],
            Self::HuggingFace(tokenizer) => tokenizer.notes(),
        }
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

    /// The token that separates documents, if there is one: a usual one that the vocabulary has, else the end of text
    /// that `tokenizer_config.json` or `generation_config.json` beside the tokenizer's file names.
    pub fn separator(&self) -> Option<u32> {
        match self {
            Self::Bytes(_) => Some(BYTE_SEPARATOR),
            Self::HuggingFace(tokenizer) => tokenizer.separator(),
        }
    }

    /// The `tokenizer_config.json` to lay beside [`to_json`](Self::to_json), if the separator is told by it alone.
    pub(crate) fn config_json(&self) -> Option<String> {
        match self {
            Self::Bytes(_) => None,
            Self::HuggingFace(tokenizer) => tokenizer.config_json(),
        }
    }

    /// The tokens of `text`, for training: unknown parts become the tokenizer's unknown token.
    ///
    /// # Errors
    /// If the tokenizer needs UTF-8 and `text` is not.
    pub fn encode_lossy(&self, argument: &'static str, text: &[u8]) -> Result<Vec<u32>> {
        match self {
            Self::Bytes(_) => Ok(text.iter().map(|&byte| u32::from(byte)).collect()),
            Self::HuggingFace(tokenizer) => tokenizer.ids(argument, text),
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
        let ids = tokenizer.ids(argument, text)?;
        tokenizer.check_known(argument, text, &ids)?;
        Ok(ids)
    }

    /// Turns a stream of ids back into text.
    pub fn decoder(&self) -> Decoder<'_> {
        Decoder::new(self)
    }
}

#[cfg(test)]
mod tests;
