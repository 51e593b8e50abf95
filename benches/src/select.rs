//! The list of all benchmarks, and the choice from it.

use crate::{Case, Dtype, Error, Part, Pass, Path};

/// A benchmark at its default shapes.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Level of the stack.
    pub part: Part,
    /// Name of the operation, layer or model.
    pub name: &'static str,
    /// Names of the sizes; batch and time come first.
    pub axes: &'static [&'static str],
    /// Whole sequences.
    pub shapes: &'static [&'static [usize]],
    /// Single tokens; time is 1, or the tokens already seen where that matters.
    pub steps: &'static [&'static [usize]],
    /// Whether it has a chunk length.
    pub chunked: bool,
    /// Ways to call it; the first is the default.
    pub paths: &'static [Path],
    /// Element types; the first is the default.
    pub dtypes: &'static [Dtype],
}

/// All benchmarks.
pub fn catalogue() -> Vec<&'static Entry> {
    let parts = [crate::ops::ENTRIES, crate::layers::ENTRIES, crate::models::ENTRIES];
    parts.into_iter().flatten().collect()
}

/// A choice of benchmarks; an empty list is the default of each benchmark.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Levels.
    pub parts: Vec<Part>,
    /// Only benchmarks whose `part/name/pass` contains one of these.
    pub filter: Vec<String>,
    /// Sizes in place of the default shapes.
    pub shape: Vec<usize>,
    /// Lengths in place of those of the shapes.
    pub time: Vec<usize>,
    /// Features per head in place of those of the shapes.
    pub head_dim: Vec<usize>,
    /// Chunk lengths.
    pub chunk: Vec<usize>,
    /// Element types.
    pub dtype: Vec<Dtype>,
    /// Ways to call.
    pub path: Vec<Path>,
    /// Passes.
    pub pass: Vec<Pass>,
}

impl Selection {
    /// The benchmarks chosen, in the order of the catalogue.
    ///
    /// # Errors
    /// [`Error::Argument`] for sizes of zero, a shape that does not fit all that is chosen, or a choice of nothing.
    pub fn cases(&self) -> Result<Vec<Case>, Error> {
        let lists =
            [("shape", &self.shape), ("time", &self.time), ("head-dim", &self.head_dim), ("chunk", &self.chunk)];
        for (argument, sizes) in lists {
            if sizes.contains(&0) {
                return Err(Error::argument(argument, "has a size of 0, expected at least 1"));
            }
        }
        let mut cases = Vec::new();
        for entry in catalogue() {
            if self.parts.is_empty() || self.parts.contains(&entry.part) {
                self.of_entry(entry, &mut cases)?;
            }
        }
        if cases.is_empty() {
            let mut names: Vec<_> = catalogue().iter().map(|entry| entry.name).collect();
            names.dedup();
            let filter = self.filter.join(",");
            let reason = format!("`{filter}` and the other options leave no benchmark; there are {}", names.join(", "));
            return Err(Error::argument("filter", reason));
        }
        Ok(cases)
    }

    fn of_entry(&self, entry: &Entry, cases: &mut Vec<Case>) -> Result<(), Error> {
        for &pass in Pass::ALL {
            let id = format!("{}/{}/{pass}", entry.part, entry.name);
            let wanted = self.filter.is_empty() || self.filter.iter().any(|filter| id.contains(filter.as_str()));
            if !wanted || !(self.pass.is_empty() || self.pass.contains(&pass)) {
                continue;
            }
            for shape in self.shapes(entry, pass)? {
                for &path in entry.paths.iter().filter(|&path| chosen(&self.path, path, &entry.paths[0])) {
                    for &dtype in entry.dtypes.iter().filter(|&dtype| chosen(&self.dtype, dtype, &entry.dtypes[0])) {
                        let chunks: Vec<_> = match (entry.chunked && pass != Pass::Step, self.chunk.is_empty()) {
                            (false, _) => vec![None],
                            (true, true) => vec![Some(thalweg_kernels::matrix::DEFAULT_CHUNK)],
                            (true, false) => self.chunk.iter().copied().map(Some).collect(),
                        };
                        for chunk in chunks {
                            let (part, name, shape) = (entry.part, entry.name.into(), shape.clone());
                            cases.push(Case { part, name, pass, shape, chunk, dtype, path });
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Default or given shapes, with the given lengths and head sizes put in.
    fn shapes(&self, entry: &Entry, pass: Pass) -> Result<Vec<Vec<usize>>, Error> {
        let defaults = if pass == Pass::Step { entry.steps } else { entry.shapes };
        let mut shapes: Vec<Vec<usize>> = defaults.iter().map(|shape| shape.to_vec()).collect();
        if !self.shape.is_empty() {
            if self.shape.len() != entry.axes.len() {
                let reason = format!(
                    "has {} sizes, {} takes {}: {}",
                    self.shape.len(),
                    entry.name,
                    entry.axes.len(),
                    entry.axes.join(",")
                );
                return Err(Error::argument("shape", reason));
            }
            shapes.truncate(1);
            for shape in &mut shapes {
                let fixed = pass == Pass::Step && shape[1] == 1;
                shape.clone_from(&self.shape);
                if fixed {
                    shape[1] = 1;
                }
            }
        }
        if !self.time.is_empty() {
            let grow = |shape: &Vec<usize>| -> Vec<Vec<usize>> {
                if pass == Pass::Step && shape[1] == 1 {
                    return vec![shape.clone()];
                }
                let with = |&time: &usize| [&shape[..1], &[time], &shape[2..]].concat();
                self.time.iter().map(with).collect()
            };
            shapes = shapes.iter().flat_map(grow).collect();
        }
        if !self.head_dim.is_empty() {
            let with = |shape: &Vec<usize>, dim: usize| -> Vec<usize> {
                let sizes = shape.iter().zip(entry.axes);
                sizes.map(|(&size, axis)| if axis.ends_with("_dim") { dim } else { size }).collect()
            };
            shapes = shapes.iter().flat_map(|shape| self.head_dim.iter().map(|&dim| with(shape, dim))).collect();
        }
        let mut seen = Vec::new();
        shapes.retain(|shape| {
            !seen.contains(shape) && {
                seen.push(shape.clone());
                true
            }
        });
        Ok(shapes)
    }
}

/// Whether `value` is in the list, or is the default where the list is empty.
fn chosen<T: PartialEq>(list: &[T], value: &T, default: &T) -> bool {
    if list.is_empty() { value == default } else { list.contains(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gla() -> Selection {
        Selection { parts: vec![Part::Ops], filter: vec!["ops/gla/".into()], ..Selection::default() }
    }

    #[test]
    fn lists_multiply() {
        let defaults: Vec<_> = gla().cases().unwrap().iter().map(|case| (case.pass, case.shape[0])).collect();
        assert_eq!(defaults, [(Pass::Forward, 1), (Pass::Train, 1), (Pass::Step, 1), (Pass::Step, 8)]);
        let selection = Selection {
            time: vec![64, 128],
            chunk: vec![32, 64],
            dtype: vec![Dtype::F32, Dtype::Bf16],
            pass: vec![Pass::Forward],
            ..gla()
        };
        let cases = selection.cases().unwrap();
        assert_eq!(cases.len(), 8);
        assert_eq!(cases[7].to_string(), "ops/gla/forward [1, 128, 4, 128, 128] bf16 native chunk 64");
    }

    #[test]
    fn a_step_keeps_its_single_token() {
        let selection = Selection {
            filter: vec!["gated_delta_rule/step".into()],
            time: vec![4096],
            head_dim: vec![64],
            ..Selection::default()
        };
        assert!(selection.cases().unwrap().iter().all(|case| case.shape[1..] == [1, 4, 64, 64]));
    }

    #[test]
    fn bad_choices_are_named() {
        let error = |selection: Selection| selection.cases().unwrap_err().to_string();
        assert!(error(Selection { shape: vec![1, 2], ..gla() }).contains("batch,time,heads,key_dim,value_dim"));
        assert!(error(Selection { time: vec![0], ..gla() }).starts_with("`time`"));
        assert!(error(Selection { filter: vec!["nothing".into()], ..Selection::default() }).contains("there are scan"));
    }
}
