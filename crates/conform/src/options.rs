//! Options in a case's metadata.

use crate::{Case, Error};

impl Case {
    fn option(&self, name: &str) -> Option<&str> {
        // Python writes an option that was not given as `None`.
        self.metadata.get(name).map(|text| text.trim()).filter(|&text| text != "None" && !text.is_empty())
    }

    /// The factor of the query: a number, a power such as `8^-0.5`, a fraction, or `none` for 1; if the file does not
    /// say, `key_dim^-0.5`.
    pub(crate) fn scale(&self, key_dim: usize) -> Result<f64, Error> {
        let Some(text) = self.option("scale") else { return Ok((key_dim as f64).powf(-0.5)) };
        let bad = || Error::Value {
            name: "scale".into(),
            found: format!("\"{text}\""),
            expected: "a finite number, a power such as 8^-0.5, a fraction such as 1/8, or none",
        };
        if text.eq_ignore_ascii_case("none") {
            return Ok(1.0);
        }
        parse_number(text, key_dim).filter(|x| x.is_finite()).ok_or_else(bad)
    }

    /// The attention window, if any.
    pub(crate) fn window(&self) -> Result<Option<usize>, Error> {
        let Some(text) = self.option("window").filter(|text| !text.eq_ignore_ascii_case("none")) else {
            return Ok(None);
        };
        let window = text.parse().ok().filter(|&window| window > 0);
        let bad = Error::Value { name: "window".into(), found: format!("\"{text}\""), expected: "a positive integer" };
        window.map(Some).ok_or(bad)
    }

    /// Whether SiLU follows a short convolution: yes, unless the file says `activation` none.
    pub(crate) fn silu(&self) -> Result<bool, Error> {
        let Some(text) = self.metadata.get("activation") else { return Ok(true) };
        match text.trim().to_ascii_lowercase().as_str() {
            "silu" | "swish" => Ok(true),
            "none" | "identity" | "linear" => Ok(false),
            _ => Err(Error::Value {
                name: "activation".into(),
                found: format!("\"{text}\""),
                expected: "silu, swish, none, identity or linear",
            }),
        }
    }

    /// Whether the file asks for linear attention's normaliser.
    pub(crate) fn normalize(&self) -> bool {
        self.option("normalize").is_some_and(|text| text.eq_ignore_ascii_case("true"))
    }
}

fn parse_number(text: &str, key_dim: usize) -> Option<f64> {
    let atom = |text: &str| match text.trim() {
        "K" | "D" => Some(key_dim as f64),
        text => text.trim_start_matches('(').trim_end_matches(')').parse::<f64>().ok(),
    };
    if let Some((base, exponent)) = text.split_once("**").or_else(|| text.split_once('^')) {
        return Some(atom(base)?.powf(atom(exponent)?));
    }
    if let Some((numerator, denominator)) = text.split_once('/') {
        return Some(atom(numerator)? / atom(denominator)?);
    }
    atom(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(entries: &[(&str, &str)]) -> Case {
        let metadata = entries.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Case { name: String::new(), op: String::new(), metadata, tensors: Default::default() }
    }

    #[test]
    fn scales_as_people_write_them() {
        let scale = |text| case(&[("scale", text)]).scale(16);
        for (text, expected) in [
            ("8^-0.5", 8f64.powf(-0.5)),
            ("8**-0.5", 8f64.powf(-0.5)),
            ("K^-0.5", 0.25),
            ("1", 1.0),
            ("1.0", 1.0),
            ("none", 1.0),
            ("0.25", 0.25),
            ("1/8", 0.125),
            ("None", 0.25),
        ] {
            assert_eq!(scale(text).unwrap(), expected, "{text}");
        }
        assert_eq!(case(&[]).scale(16).unwrap(), 0.25);
        for text in ["eight", "1/0", "nan", "8^", "^"] {
            assert!(matches!(scale(text), Err(Error::Value { .. })), "{text}");
        }
    }

    #[test]
    fn windows_and_activations() {
        assert_eq!(case(&[("window", "None")]).window().unwrap(), None);
        assert_eq!(case(&[("window", "16")]).window().unwrap(), Some(16));
        assert!(case(&[("window", "0")]).window().is_err());
        assert!(case(&[]).silu().unwrap() && !case(&[("activation", "None")]).silu().unwrap());
    }
}
