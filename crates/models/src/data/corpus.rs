//! Documents packed into rows of tokens.

use rand::Rng;
use rand::seq::SliceRandom;
use std::sync::Mutex;

use super::{Batch, BatchSource, Document, FNV_START, fnv1a, rng};
use crate::Tokenizer;
use crate::error::{Error, Result};

/// Tokens of documents, one after the other.
#[derive(Debug, Clone, Default)]
pub struct TokenStream {
    /// Document after document, each led by the separator if there is one and there are several documents.
    pub ids: Vec<u32>,
    /// Where each document starts, increasing.
    pub starts: Vec<usize>,
    /// Whether a separator leads each document.
    separated: bool,
    /// Bytes of text.
    pub bytes: usize,
}

/// Text as tokens, split into a part to train on and the last part to judge by.
#[derive(Debug)]
pub struct Corpus {
    train: TokenStream,
    held_out: TokenStream,
    context: usize,
    seed: u64,
    vocab_size: usize,
    fingerprint: u64,
    /// The order of the rows of the epoch that was asked for last.
    order: Mutex<Option<Epoch>>,
}

#[derive(Debug)]
struct Epoch {
    number: u64,
    /// Where the first row starts, so that rows are cut elsewhere in every epoch.
    offset: usize,
    rows: Vec<u32>,
}

/// The part of the text that is held out.
pub const HELD_OUT: f64 = 0.1;

impl Corpus {
    /// Tokenizes `documents` and holds out the last tenth of the text. Rows have `context` tokens; `seed` fixes their
    /// order.
    ///
    /// # Errors
    /// If the text is empty, cannot be tokenized, or has too few tokens for a row in either part.
    pub fn new(documents: &[Document], tokenizer: &Tokenizer, context: usize, seed: u64) -> Result<Self> {
        if context == 0 {
            return Err(Error::argument("context", "must be at least 1, got 0"));
        }
        let total: usize = documents.iter().map(|document| document.bytes.len()).sum();
        if total == 0 {
            return Err(Error::argument("text", "is empty"));
        }
        // Only several documents need telling apart; in one text a separator would be a token seen once.
        let separator = if documents.len() > 1 { tokenizer.separator() } else { None };
        let cut = total - (total as f64 * HELD_OUT) as usize;
        let (mut train, mut held_out) = (TokenStream::default(), TokenStream::default());
        let mut position = 0;
        for document in documents {
            let split = character_boundary(&document.bytes, cut.saturating_sub(position));
            let (first, second) = document.bytes.split_at(split);
            train.push(first, separator, tokenizer)?;
            held_out.push(second, separator, tokenizer)?;
            position += document.bytes.len();
        }
        for (part, stream) in [("training", &train), ("held-out", &held_out)] {
            if stream.ids.len() <= context {
                let tokens = stream.ids.len();
                return Err(Error::argument(
                    "text",
                    format!("its {part} part has {tokens} tokens, a row needs context + 1 = {}", context + 1),
                ));
            }
        }
        let all = train.ids.iter().chain(&held_out.ids);
        let fingerprint = fnv1a(FNV_START, all.flat_map(|id| id.to_le_bytes()));
        let vocab_size = tokenizer.vocab_size();
        Ok(Self { train, held_out, context, seed, vocab_size, fingerprint, order: Mutex::new(None) })
    }

    /// The part that is trained on.
    pub fn train_stream(&self) -> &TokenStream {
        &self.train
    }

    /// The part that is held out.
    pub fn held_out_stream(&self) -> &TokenStream {
        &self.held_out
    }

    /// Rows per epoch.
    pub fn rows(&self) -> usize {
        // One row less than fits leaves room to shift the cuts.
        ((self.train.ids.len() - 1) / self.context - 1).max(1)
    }

    /// Where the training row number `index` starts.
    fn row_start(&self, index: u64) -> usize {
        let rows = self.rows();
        let (number, row) = (index / rows as u64, (index % rows as u64) as usize);
        let mut order = self.order.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if order.as_ref().is_none_or(|epoch| epoch.number != number) {
            let mut rng = rng(self.seed, number);
            let mut shuffled: Vec<u32> = (0..rows as u32).collect();
            shuffled.shuffle(&mut rng);
            let slack = self.train.ids.len() - 1 - rows * self.context;
            *order = Some(Epoch { number, offset: rng.random_range(0..=slack), rows: shuffled });
        }
        order.as_ref().map_or(0, |epoch| epoch.offset + epoch.rows[row] as usize * self.context)
    }
}

impl TokenStream {
    fn push(&mut self, text: &[u8], separator: Option<u32>, tokenizer: &Tokenizer) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        self.starts.push(self.ids.len());
        self.separated = separator.is_some();
        self.ids.extend(separator);
        self.ids.extend(tokenizer.encode_lossy("text", text)?);
        self.bytes += text.len();
        Ok(())
    }

    /// Rows of `context` tokens from each of `starts`. The last token of a document that no separator ends counts nothing:
    /// it says nothing about how the next document begins.
    fn batch(&self, starts: &[usize], context: usize) -> Batch {
        let tokens = starts.len() * context;
        let mut batch = Batch {
            inputs: Vec::with_capacity(tokens),
            targets: Vec::with_capacity(tokens),
            weights: None,
            rows: starts.len(),
            context,
            cu_seqlens: None,
        };
        let mut bounds = Vec::new();
        for &start in starts {
            let first = self.starts.partition_point(|&at| at <= start);
            let met = self.starts[first..].iter().take_while(|&&at| at <= start + context);
            let met: Vec<usize> = met.map(|at| batch.inputs.len() + at - start).collect();
            if !self.separated && !met.is_empty() {
                let weights = batch.weights.get_or_insert_with(|| vec![1.0; tokens]);
                met.iter().for_each(|at| weights[at - 1] = 0.0);
            }
            bounds.push(batch.inputs.len());
            bounds.extend(met.into_iter().filter(|&at| at < batch.inputs.len() + context));
            batch.inputs.extend(&self.ids[start..start + context]);
            batch.targets.extend(&self.ids[start + 1..=start + context]);
        }
        bounds.push(tokens);
        if bounds.len() > starts.len() + 1 {
            batch.cu_seqlens = Some(bounds);
        }
        batch
    }
}

impl BatchSource for Corpus {
    fn train(&self, index: u64, rows: usize) -> Batch {
        let first = index * rows as u64;
        let starts: Vec<usize> = (first..first + rows as u64).map(|row| self.row_start(row)).collect();
        self.train.batch(&starts, self.context)
    }

    fn held_out(&self, rows: usize, limit: Option<usize>) -> Box<dyn Iterator<Item = Batch> + '_> {
        let available = (self.held_out.ids.len() - 1) / self.context;
        let taken = limit.map_or(available, |limit| available.min(limit.max(1).saturating_mul(rows)));
        let starts: Vec<usize> = (0..taken).map(|row| row * available / taken * self.context).collect();
        let batches: Vec<_> = starts.chunks(rows).map(<[usize]>::to_vec).collect();
        Box::new(batches.into_iter().map(|starts| self.held_out.batch(&starts, self.context)))
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn bytes_per_token(&self) -> Option<f64> {
        Some(self.held_out.bytes as f64 / self.held_out.ids.len() as f64)
    }

    fn fingerprint(&self) -> u64 {
        self.fingerprint
    }
}

/// The last position up to `at` where a character of `text` starts.
fn character_boundary(text: &[u8], at: usize) -> usize {
    let mut at = at.min(text.len());
    while at > 0 && at < text.len() && text[at] & 0xc0 == 0x80 {
        at -= 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(texts: &[&str]) -> Vec<Document> {
        texts.iter().map(|text| Document { name: String::new(), bytes: text.as_bytes().to_vec() }).collect()
    }

    #[test]
    fn the_last_tenth_is_held_out_between_characters() {
        // 100 bytes; the cut at 90 would split the character at 89.
        let text = "a".repeat(89) + "äöüäö" + "b";
        let corpus = Corpus::new(&documents(&[&text]), &Tokenizer::bytes(), 4, 0).unwrap();
        assert_eq!((corpus.train.bytes, corpus.held_out.bytes), (89, 11));
        assert_eq!(corpus.bytes_per_token(), Some(1.0));
    }

    #[test]
    fn an_epoch_shows_every_row_once_and_the_next_in_another_order() {
        let text: String = (0..400).map(|i| char::from(b'a' + (i % 26) as u8)).collect();
        let corpus = Corpus::new(&documents(&[&text]), &Tokenizer::bytes(), 8, 3).unwrap();
        let rows = corpus.rows() as u64;
        let epoch = |number: u64| (0..rows).map(|row| corpus.row_start(number * rows + row)).collect::<Vec<_>>();
        let (first, second) = (epoch(0), epoch(1));
        assert_ne!(first, second);
        let mut sorted = first.clone();
        sorted.sort_unstable();
        assert!(sorted.windows(2).all(|pair| pair[1] - pair[0] == 8), "{sorted:?}");
        assert_eq!(first, epoch(0), "a batch depends on its index alone");
        let batch = corpus.train(1, 4);
        assert_eq!(batch.inputs[1..8], batch.targets[..7]);
        assert_eq!(batch.cu_seqlens, None);
    }

    #[test]
    fn documents_meet_at_boundaries_with_separators() {
        let corpus = Corpus::new(&documents(&["aaaaa", "bbbbb", &"c".repeat(40)]), &Tokenizer::bytes(), 3, 0).unwrap();
        assert_eq!(corpus.train.starts, [0, 6, 12]);
        assert_eq!(corpus.train.ids[6], crate::BYTE_SEPARATOR);
        let batch = corpus.train.batch(&[4, 6, 12], 3);
        // The first row crosses into `b` at its third token; the others start with a document.
        assert_eq!(batch.cu_seqlens, Some(vec![0, 2, 3, 6, 9]));
        assert_eq!(batch.targets[1], crate::BYTE_SEPARATOR, "the end of a document is learnt");
    }

    #[test]
    fn without_a_separator_the_end_of_a_document_does_not_count() {
        let json = r#"{"version":"1.0","truncation":null,"padding":null,"normalizer":null,"post_processor":null,
            "added_tokens":[],"pre_tokenizer":{"type":"Whitespace"},"decoder":null,
            "model":{"type":"WordLevel","vocab":{"?":0,"a":1,"b":2,"c":3},"unk_token":"?"}}"#;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, json).unwrap();
        let tokenizer = Tokenizer::load(&path).unwrap();
        assert_eq!(tokenizer.separator(), None);
        let corpus = Corpus::new(&documents(&["a a a a", "b b b", &"c ".repeat(40)]), &tokenizer, 3, 0).unwrap();
        assert_eq!(corpus.train.starts, [0, 4, 7]);
        // Rows with a document's end inside, at their last token, and nowhere.
        for (start, weights) in [(2, Some([1.0, 0.0, 1.0])), (1, Some([1.0, 1.0, 0.0])), (7, None)] {
            let batch = corpus.train.batch(&[start], 3);
            assert_eq!(batch.weights, weights.map(Vec::from), "row at {start}");
        }
        let batch = corpus.train.batch(&[7, 4, 2], 3);
        assert_eq!(batch.weights.unwrap(), [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]);
        assert_eq!(batch.cu_seqlens, Some(vec![0, 3, 6, 8, 9]));
        // One document has no such end, and separators are learnt.
        assert_eq!(Corpus::new(&documents(&[&"a ".repeat(40)]), &tokenizer, 3, 0).unwrap().train(0, 4).weights, None);
        let separated =
            Corpus::new(&documents(&["aaaaa", "bbbbb", &"c".repeat(40)]), &Tokenizer::bytes(), 3, 0).unwrap();
        assert_eq!(separated.train.batch(&[4, 6, 12], 3).weights, None);
    }

    #[test]
    fn texts_too_short_for_a_row_are_refused() {
        let error = Corpus::new(&documents(&["short"]), &Tokenizer::bytes(), 16, 0).unwrap_err();
        assert_eq!(error.to_string(), "text: its training part has 5 tokens, a row needs context + 1 = 17");
        assert!(Corpus::new(&documents(&[""]), &Tokenizer::bytes(), 16, 0).is_err());
        assert!(Corpus::new(&documents(&["text"]), &Tokenizer::bytes(), 0, 0).is_err());
    }

    #[test]
    fn held_out_batches_cover_the_part_or_a_spread_of_it() {
        let corpus = Corpus::new(&documents(&[&"x".repeat(2000)]), &Tokenizer::bytes(), 8, 0).unwrap();
        let all: usize = corpus.held_out(4, None).map(|batch| batch.rows).sum();
        assert_eq!(all, 199 / 8);
        assert_eq!(corpus.held_out(4, Some(2)).map(|batch| batch.rows).sum::<usize>(), 8);
    }
}
