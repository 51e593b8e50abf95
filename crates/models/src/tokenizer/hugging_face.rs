//! A tokenizer in Hugging Face's format, as it is used here.

use std::ops::Deref;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{Model, ModelWrapper, OffsetReferential, OffsetType, PreTokenizer};

use crate::error::{Error, Result};

/// Tokens that published tokenizers use to separate documents, in order of preference.
const SEPARATORS: [&str; 8] =
    ["<|endoftext|>", "<|end_of_text|>", "<|eot|>", "</s>", "<eos>", "<|im_end|>", "[SEP]", "<|eos|>"];

/// The file beside a `tokenizer.json` that names its special tokens.
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const GENERATION_CONFIG: &str = "generation_config.json";

/// A tokenizer in Hugging Face's format that neither truncates nor pads nor draws its merges, whatever its file says.
#[derive(Debug, Clone)]
pub struct HuggingFace {
    tokenizer: tokenizers::Tokenizer,
    /// Stands for text that the vocabulary does not have.
    unknown: Option<u32>,
    separator: Option<u32>,
    notes: Vec<String>,
}

impl Deref for HuggingFace {
    type Target = tokenizers::Tokenizer;

    fn deref(&self) -> &Self::Target {
        &self.tokenizer
    }
}

impl From<tokenizers::Tokenizer> for HuggingFace {
    fn from(mut tokenizer: tokenizers::Tokenizer) -> Self {
        let mut notes = Vec::new();
        if let Some(truncation) = tokenizer.get_truncation() {
            notes.push(format!("truncation to {} tokens is switched off", truncation.max_length));
            // Only a truncation that is set can be refused.
            let _ = tokenizer.with_truncation(None);
        }
        if tokenizer.get_padding().is_some() {
            notes.push("padding is switched off".to_owned());
            tokenizer.with_padding(None);
        }
        if let ModelWrapper::BPE(bpe) = tokenizer.get_model()
            && let Some(dropout) = bpe.dropout.filter(|&dropout| dropout > 0.0)
        {
            notes.push(format!("dropout of {dropout} of the merges is switched off"));
            let mut whole = bpe.clone();
            whole.dropout = None;
            tokenizer.with_model(whole);
        }
        let separator = SEPARATORS.iter().find_map(|token| tokenizer.token_to_id(token));
        Self { unknown: unknown(tokenizer.get_model()), separator, notes, tokenizer }
    }
}

/// The id that `model` gives what it does not know.
fn unknown(model: &ModelWrapper) -> Option<u32> {
    let token = match model {
        ModelWrapper::BPE(bpe) => bpe.unk_token.as_ref()?,
        ModelWrapper::WordPiece(word_piece) => &word_piece.unk_token,
        ModelWrapper::WordLevel(word_level) => &word_level.unk_token,
        ModelWrapper::Unigram(unigram) => {
            // The field is private, but it is written.
            #[derive(Deserialize)]
            struct Written {
                unk_id: Option<u32>,
            }
            let written = serde_json::to_string(unigram).ok()?;
            return serde_json::from_str::<Written>(&written).ok()?.unk_id;
        }
    };
    model.token_to_id(token)
}

impl HuggingFace {
    /// The tokenizer that `bytes`, the content of `path`, describe.
    pub(super) fn read(path: &Path, bytes: &[u8]) -> Result<Self> {
        let tokenizer = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| {
            Error::argument("tokenizer", format!("{} is not a tokenizer.json: {error}", path.display()))
        })?;
        let mut read = Self::from(tokenizer);
        for note in &mut read.notes {
            *note = format!("tokenizer: {}: its {note}", path.display());
        }
        for name in [TOKENIZER_CONFIG, GENERATION_CONFIG] {
            let beside = path.with_file_name(name);
            if read.separator.is_none() && beside.is_file() {
                match read.end_of_text(&beside) {
                    Ok(id) => read.separator = id,
                    Err(reason) => read.notes.push(format!("tokenizer: {}: {reason}", beside.display())),
                }
            }
        }
        Ok(read)
    }

    /// The end of text that the configuration at `path` names, by its text or its id.
    fn end_of_text(&self, path: &Path) -> std::result::Result<Option<u32>, String> {
        let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
        let config: Value = serde_json::from_slice(&bytes).map_err(|error| format!("is not JSON: {error}"))?;
        let (token, id) = (&config["eos_token"], &config["eos_token_id"]);
        // A token is a string or an object; there is one id or a list of them.
        if let Some(text) = token.as_str().or(token["content"].as_str()) {
            let id = self.token_to_id(text);
            return id.map(Some).ok_or(format!("eos_token `{text}` is not in the vocabulary"));
        }
        let ids = id.as_array().map_or(std::slice::from_ref(id), Vec::as_slice);
        let mut ids = ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).peekable();
        if ids.peek().is_none() {
            return Ok(None);
        }
        let known = ids.find(|&id| self.id_to_token(id).is_some());
        known.map(Some).ok_or(format!("eos_token_id {id} is not in the vocabulary"))
    }

    pub(super) fn notes(&self) -> &[String] {
        &self.notes
    }

    pub(super) fn separator(&self) -> Option<u32> {
        self.separator
    }

    /// The configuration from which [`read`](Self::read) finds a separator that is not a usual one.
    pub(super) fn config_json(&self) -> Option<String> {
        let token = self.id_to_token(self.separator?)?;
        (!SEPARATORS.contains(&token.as_str())).then(|| serde_json::json!({ "eos_token": token }).to_string())
    }

    pub(super) fn ids(&self, argument: &'static str, text: &[u8]) -> Result<Vec<u32>> {
        let encoding = self
            .encode_fast(utf8(argument, text)?, false)
            .map_err(|error| Error::argument(argument, format!("cannot be tokenized: {error}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Refuses `text` of which `ids` do not tell all.
    pub(super) fn check_known(&self, argument: &'static str, text: &[u8], ids: &[u32]) -> Result<()> {
        if let Some(at) = ids.iter().position(|&id| Some(id) == self.unknown) {
            return Err(Error::argument(
                argument,
                format!("token {at} is outside the vocabulary (the tokenizer calls it unknown)"),
            ));
        }
        if ids.is_empty() && !text.is_empty() {
            return Err(Error::argument(argument, "nothing in it is in the tokenizer's vocabulary"));
        }
        if self.unknown.is_none()
            && let Some(word) = self.left_out(utf8(argument, text)?)
        {
            return Err(Error::argument(argument, format!("`{word}` has parts that are outside the vocabulary")));
        }
        Ok(())
    }

    /// A word of which the model leaves out a part: BPE without an unknown token skips what it does not know.
    fn left_out(&self, text: &str) -> Option<String> {
        let mut words = self.get_added_vocabulary().extract_and_normalize(self.get_normalizer(), text);
        if let Some(pre_tokenizer) = self.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut words).ok()?;
        }
        let words = words.get_splits(OffsetReferential::Original, OffsetType::Byte).into_iter();
        let mut words = words.filter(|(_, _, tokens)| tokens.is_none()).map(|(word, ..)| word);
        // Offsets of tokens count what became one.
        let covered =
            |word: &str| Some(self.get_model().tokenize(word).ok()?.last().map_or(0, |token| token.offsets.1));
        words.find(|&word| covered(word).is_some_and(|covered| covered < word.len())).map(str::to_owned)
    }
}

fn utf8<'a>(argument: &'static str, text: &'a [u8]) -> Result<&'a str> {
    std::str::from_utf8(text)
        .map_err(|error| Error::argument(argument, format!("is not UTF-8, which the tokenizer needs: {error}")))
}
