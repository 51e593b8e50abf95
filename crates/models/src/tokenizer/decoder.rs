//! Ids to text as they come.

use tokenizers::DecoderWrapper;

use super::{HuggingFace, Tokenizer};

/// Decodes ids one by one, giving out text as soon as it is certain. All pieces together are the decoding of all ids
/// together, special tokens skipped, so a prompt is pushed as well as what follows it; every id costs the same.
///
/// One difference from `tokenizers`: where some bytes of a run of byte-fallback tokens are no character, it replaces the
/// whole run in hindsight. Here only those bytes are replaced; characters that were whole stay as they were given out.
#[derive(Debug)]
pub struct Decoder<'a>(Kind<'a>);

#[derive(Debug)]
enum Kind<'a> {
    /// Ids are bytes.
    Bytes(Characters),
    /// Tokens spell bytes.
    ByteLevel(&'a HuggingFace, Characters),
    /// What a token looks like depends on those before it.
    Window(Window<'a>),
}

impl<'a> Decoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        let Tokenizer::HuggingFace(tokenizer) = tokenizer else { return Self(Kind::Bytes(Characters::default())) };
        Self(match stages(tokenizer.get_decoder()) {
            [DecoderWrapper::ByteLevel(_), rest @ ..] if rest.iter().all(|s| matches!(s, DecoderWrapper::Fuse(_))) => {
                Kind::ByteLevel(tokenizer, Characters::default())
            }
            stages => Kind::Window(Window::new(tokenizer, stages)),
        })
    }

    /// The text that `id` completes; may be empty.
    pub fn push(&mut self, id: u32) -> String {
        match &mut self.0 {
            Kind::Bytes(characters) => match u8::try_from(id) {
                Ok(byte) => characters.push(&[byte]),
                Err(_) => characters.finish(),
            },
            Kind::ByteLevel(tokenizer, characters) => {
                token(tokenizer, id).map_or_else(String::new, |token| characters.push(&spelt_bytes(&token)))
            }
            Kind::Window(window) => window.push(id),
        }
    }

    /// The text that is left at the end: an unfinished character becomes replacement characters.
    pub fn finish(&mut self) -> String {
        match &mut self.0 {
            Kind::Bytes(characters) | Kind::ByteLevel(_, characters) => characters.finish(),
            Kind::Window(window) => window.finish(),
        }
    }
}

/// The decoders that are applied one after the other.
fn stages(decoder: Option<&DecoderWrapper>) -> &[DecoderWrapper] {
    match decoder {
        None => &[],
        Some(DecoderWrapper::Sequence(sequence)) => sequence.get_decoders(),
        Some(one) => std::slice::from_ref(one),
    }
}

/// The token of `id`, unless decoding skips it.
fn token(tokenizer: &HuggingFace, id: u32) -> Option<String> {
    tokenizer.id_to_token(id).filter(|token| !tokenizer.get_added_vocabulary().is_special_token(token))
}

/// The bytes of a token of a byte-level vocabulary; tokens that were added to it stand for themselves.
fn spelt_bytes(token: &str) -> Vec<u8> {
    token.chars().map(spelt_byte).collect::<Option<_>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

/// GPT-2's table: bytes that are printable in Latin-1 are spelt so, the others follow from U+0100 on in their order.
fn spelt_byte(character: char) -> Option<u8> {
    let byte = match u32::from(character) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => code,
        code @ 0x100..=0x120 => code - 0x100,
        code @ 0x121..=0x142 => code - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// The byte of a token like `<0x0A>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// Bytes to characters.
#[derive(Debug, Default)]
struct Characters {
    /// The start of a character.
    pending: Vec<u8>,
}

impl Characters {
    /// The characters that `bytes` complete; bytes that cannot be part of one become replacement characters.
    fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend(bytes);
        self.take(false)
    }

    fn finish(&mut self) -> String {
        self.take(true)
    }

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

/// Ids that are decoded together with the next one, so that it looks as it does in its place: what a token looks like
/// depends on whether it is the first and on the one before it, not on ones further away.
///
/// `tokenizers::DecodeStream` does alike, but has no end, stops at an unfinished run of byte-fallback tokens
/// (`InvalidPrefix`), and grows for as long as tokens give no text or no whole character.
#[derive(Debug)]
struct Window<'a> {
    tokenizer: &'a HuggingFace,
    /// Whether tokens like `<0x0A>` are bytes.
    fallback: bool,
    /// Whether a replacement character at the end may be an unfinished character.
    unfinished: bool,
    ids: Vec<u32>,
    /// The text of `ids` that was given out.
    printed: String,
    /// Where `ids` may be cut: not within a character.
    cut: usize,
    /// Ids of byte tokens that start a character, and their bytes.
    pending: (Vec<u32>, Vec<u8>),
    /// Whether `ids` are bytes that are no character, which a byte that follows would be drawn into.
    broken: bool,
}

/// Ids that a window keeps at least.
const CONTEXT: usize = 8;

impl<'a> Window<'a> {
    fn new(tokenizer: &'a HuggingFace, stages: &[DecoderWrapper]) -> Self {
        Self {
            tokenizer,
            fallback: stages.iter().any(|stage| matches!(stage, DecoderWrapper::ByteFallback(_))),
            unfinished: stages.iter().any(|stage| matches!(stage, DecoderWrapper::ByteLevel(_))),
            ids: Vec::new(),
            printed: String::new(),
            cut: 0,
            pending: Default::default(),
            broken: false,
        }
    }

    fn push(&mut self, id: u32) -> String {
        let Some(token) = token(self.tokenizer, id) else { return String::new() };
        match fallback_byte(&token).filter(|_| self.fallback) {
            Some(byte) => self.push_byte(id, byte),
            None => {
                let before = self.break_off();
                self.broken = false;
                before + &self.extend(&[id])
            }
        }
    }

    fn push_byte(&mut self, id: u32, byte: u8) -> String {
        self.pending.0.push(id);
        self.pending.1.push(byte);
        match std::str::from_utf8(&self.pending.1) {
            Ok(character) => {
                let character = character.to_owned();
                let (ids, _) = std::mem::take(&mut self.pending);
                if std::mem::take(&mut self.broken) {
                    self.restart(ids);
                    return character;
                }
                self.extend(&ids)
            }
            Err(error) if error.error_len().is_none() => String::new(),
            // No byte starts or goes on a character: alone it is broken, else it may start the next one.
            Err(_) if self.pending.1.len() == 1 => self.break_off(),
            Err(_) => {
                self.pending.0.pop();
                self.pending.1.pop();
                self.break_off() + &self.push_byte(id, byte)
            }
        }
    }

    /// Gives up the character that was started: a replacement character for each of its bytes.
    fn break_off(&mut self) -> String {
        let (ids, bytes) = std::mem::take(&mut self.pending);
        if !ids.is_empty() {
            self.restart(ids);
            self.broken = true;
        }
        char::REPLACEMENT_CHARACTER.to_string().repeat(bytes.len())
    }

    /// Goes on after `ids`, whose text was given out.
    fn restart(&mut self, ids: Vec<u32>) {
        self.ids = ids;
        self.printed = self.certain(&self.text()).to_owned();
        self.cut = 0;
    }

    /// Appends whole characters, if bytes; returns the text that becomes certain.
    fn extend(&mut self, ids: &[u32]) -> String {
        self.ids.extend(ids);
        let text = self.text();
        let certain = self.certain(&text);
        let whole = certain.len() == text.len();
        let new = self.give_out(certain);
        // Without a whole character for long there is none to be cut.
        if self.ids.len() >= self.cut + CONTEXT && (whole || self.ids.len() >= 8 * CONTEXT) {
            let kept = self.ids.split_off(self.cut);
            self.restart(kept);
            self.cut = self.ids.len();
        }
        new
    }

    fn finish(&mut self) -> String {
        let text = self.text();
        let held = self.give_out(&text);
        held + &self.break_off()
    }

    fn text(&self) -> String {
        // No decoder of `tokenizers` fails; some cannot decode nothing.
        if self.ids.is_empty() { String::new() } else { self.tokenizer.decode(&self.ids, true).unwrap_or_default() }
    }

    /// The part of the window's text that the next token cannot change.
    fn certain<'t>(&self, text: &'t str) -> &'t str {
        text.strip_suffix(char::REPLACEMENT_CHARACTER).filter(|_| self.unfinished).unwrap_or(text)
    }

    /// What of the window's `text` was not given out yet.
    fn give_out(&mut self, text: &str) -> String {
        let same = self.printed.chars().zip(text.chars()).take_while(|(a, b)| a == b);
        let new = text[same.map(|(character, _)| character.len_utf8()).sum()..].to_owned();
        if !new.is_empty() {
            self.printed = text.to_owned();
        }
        new
    }
}

#[cfg(test)]
mod tests;
