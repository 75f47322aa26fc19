//! Lists in the order of their entries' keys, and what differs between two of them.
//!
//! Entries are shared: those that stay the same are the same in memory, in the list before and in
//! the one after, and cost no more to compare than their addresses.

use std::{cmp::Ordering, sync::Arc};

/// An entry of a list in which no two have one key.
pub trait Keyed {
    /// What orders the list: the namespace, empty where there is none, and the name.
    fn key(&self) -> (&str, &str);
}

/// An entry before and after a change. One of them may be missing, never both.
pub type Change<'a, T> = (Option<&'a Arc<T>>, Option<&'a Arc<T>>);

/// What is not the same in both lists, in the order of the keys.
pub fn changes<'a, T: Keyed + PartialEq>(
    before: impl IntoIterator<Item = &'a Arc<T>>,
    after: impl IntoIterator<Item = &'a Arc<T>>,
) -> Vec<Change<'a, T>> {
    let (mut before, mut after) = (before.into_iter().peekable(), after.into_iter().peekable());
    let mut changes = Vec::new();
    loop {
        let order = match (before.peek(), after.peek()) {
            (Some(old), Some(new)) if Arc::ptr_eq(old, new) => Ordering::Equal,
            (Some(old), Some(new)) => old.key().cmp(&new.key()),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return changes,
        };
        let change = match order {
            Ordering::Less => (before.next(), None),
            Ordering::Greater => (None, after.next()),
            Ordering::Equal => (before.next(), after.next()),
        };
        if let (Some(old), Some(new)) = change
            && (Arc::ptr_eq(old, new) || old == new)
        {
            continue;
        }
        changes.push(change);
    }
}

/// Takes over into `after` the entries of `before` that say the same.
pub fn share<'a, T: Keyed + PartialEq + 'a>(
    before: impl IntoIterator<Item = &'a Arc<T>>,
    after: impl IntoIterator<Item = &'a mut Arc<T>>,
) {
    let mut before = before.into_iter().peekable();
    for new in after {
        while before.next_if(|old| old.key() < new.key()).is_some() {}
        if let Some(old) = before.next_if(|old| old == &&*new) {
            *new = Arc::clone(old);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug, PartialEq)]
    struct Entry(String, u8);

    impl Keyed for Entry {
        fn key(&self) -> (&str, &str) {
            ("", &self.0)
        }
    }

    type Map = BTreeMap<String, u8>;

    fn list(map: &Map) -> Vec<Arc<Entry>> {
        map.iter().map(|(key, value)| Arc::new(Entry(key.clone(), *value))).collect()
    }

    fn maps() -> impl Strategy<Value = [Map; 2]> {
        let map = || prop::collection::btree_map("[a-d]{1,2}", 0..3_u8, 0..12);
        [map(), map()]
    }

    proptest! {
        #[test]
        fn what_changed_makes_the_one_of_the_other([old, new] in maps()) {
            let (before, mut after) = (list(&old), list(&new));
            let mut made = old;
            for (old, new) in changes(&before, &after) {
                prop_assert_ne!(old, new);
                if let Some(old) = old {
                    prop_assert_eq!(made.remove(&old.0), Some(old.1));
                }
                if let Some(new) = new {
                    prop_assert_eq!(made.insert(new.0.clone(), new.1), None);
                }
            }
            prop_assert_eq!(&made, &new);

            share(&before, &mut after);
            prop_assert_eq!(&after, &list(&new));
            let same = |new: &Arc<Entry>| before.iter().any(|old| Arc::ptr_eq(old, new));
            prop_assert!(after.iter().all(|new| same(new) == before.contains(new)));
        }
    }
}
