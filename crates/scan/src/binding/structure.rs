//! The tensors of an operation by name, and the same tensors as a plain list, which is how backends and graphs see them.

/// The names of an operation's tensors without the tensors: which of those that may be absent are there.
///
/// Law: `structure.join(tensors)` undoes `(structure, tensors) = split(operands)`.
pub(crate) trait Structure: std::fmt::Debug + Clone + Send + Sync + 'static {
    /// The operands, each a `T`.
    type Of<T>;

    /// Takes the operands apart: those that are there, in the order of their declaration.
    fn split<T>(operands: Self::Of<T>) -> (Self, Vec<T>);

    /// Puts as many operands as there are names together again.
    fn join<T>(&self, tensors: impl IntoIterator<Item = T>) -> Self::Of<T>;

    /// Names of the operands that are there.
    fn names(&self) -> Vec<&'static str>;
}

/// Declares the operands of an operation: a struct generic in the tensor, with those that always exist first, then the
/// containers (`Option`, `Gate`, ...) of those that may not. A container is anything with a `map`.
macro_rules! operands {
    (
        $(#[$meta:meta])* struct $name:ident {
            $($(#[$doc:meta])* $field:ident),* $(,)?
            $(; $($(#[$maybe_doc:meta])* $maybe:ident: $container:ident),* $(,)?)?
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone)]
        pub(crate) struct $name<T> {
            $($(#[$doc])* pub $field: T,)*
            $($($(#[$maybe_doc])* pub $maybe: $container<T>,)*)?
        }

        impl $crate::binding::Structure for $name<()> {
            type Of<T> = $name<T>;

            fn split<T>(operands: $name<T>) -> (Self, Vec<T>) {
                let mut tensors = Vec::new();
                let structure = $name {
                    $($field: tensors.push(operands.$field),)*
                    $($($maybe: operands.$maybe.map(|x| tensors.push(x)),)*)?
                };
                (structure, tensors)
            }

            fn join<T>(&self, tensors: impl IntoIterator<Item = T>) -> $name<T> {
                let mut tensors = tensors.into_iter();
                let mut next = || match tensors.next() {
                    Some(tensor) => tensor,
                    None => unreachable!("as many tensors as names"),
                };
                $name {
                    $($field: next(),)*
                    $($($maybe: self.$maybe.clone().map(|()| next()),)*)?
                }
            }

            fn names(&self) -> Vec<&'static str> {
                #[allow(unused_mut)]
                let mut names = vec![$(stringify!($field)),*];
                $($(self.$maybe.clone().map(|()| names.push(stringify!($maybe)));)*)?
                names
            }
        }
    };
}
pub(crate) use operands;

#[cfg(test)]
mod tests {
    use super::Structure;

    operands! {
        struct Three { x, y; z: Option }
    }

    #[test]
    fn what_is_taken_apart_is_put_together() {
        for z in [None, Some(3)] {
            let (structure, tensors) = Three::<()>::split(Three { x: 1, y: 2, z });
            assert_eq!(tensors.len(), 2 + usize::from(z.is_some()));
            assert_eq!(structure.names().len(), tensors.len());
            let Three { x, y, z: third } = structure.join(tensors);
            assert_eq!((x, y, third), (1, 2, z));
        }
    }
}
