//! Red-black trees of the guest's kernel, changed from outside: nothing is written, the words that would change are told.
//!
//! The trees are the kernel's own (`include/linux/rbtree_types.h`: a node is a word with its parent and its colour, and a word for
//! each child), the way they are balanced is that of the textbooks (R. Bayer, 1972; Guibas and Sedgewick, 1978), so a tree that was
//! changed here is one that the kernel can go on changing. Only the nodes that a change touches are read. Each is held against
//! what points to it, and every walk ends: what the guest holds may be no tree at all.

use std::collections::BTreeMap;

use crate::addr::Gva;
use crate::kernel::locate::KernelError;

/// Longest way from a tree's root to a leaf: twice the binary logarithm of more nodes than memory holds.
const MAX_DEPTH: usize = 96;
/// The colour, in the word that holds the parent: a node is red without it (`RB_BLACK`).
const BLACK: u64 = 1;
/// What else that word could hold besides the parent's address, which is aligned.
const FLAGS: u64 = 7;

/// Reads a word of the guest's memory.
pub(super) type ReadWord<'a> = &'a dyn Fn(Gva) -> Result<u64, KernelError>;

/// Words of the guest's memory as they would be.
pub(super) struct Draft<'a> {
    read: ReadWord<'a>,
    /// What is there, and what would be, of every word that was asked for.
    words: BTreeMap<Gva, (u64, u64)>,
}

impl<'a> Draft<'a> {
    pub(super) fn new(read: ReadWord<'a>) -> Self {
        Self {
            read,
            words: BTreeMap::new(),
        }
    }

    /// The word at `at`, as it would be.
    pub(super) fn get(&mut self, at: Gva) -> Result<u64, KernelError> {
        if let Some((_, new)) = self.words.get(&at) {
            return Ok(*new);
        }
        let word = (self.read)(at)?;
        self.words.insert(at, (word, word));
        Ok(word)
    }

    /// Has `value` at `at`.
    pub(super) fn set(&mut self, at: Gva, value: u64) -> Result<(), KernelError> {
        self.get(at)?;
        if let Some((_, new)) = self.words.get_mut(&at) {
            *new = value;
        }
        Ok(())
    }

    /// The words that change, by address: what is there, and what would be.
    pub(super) fn changes(&self) -> impl Iterator<Item = (Gva, u64, u64)> + '_ {
        let all = self.words.iter().map(|(at, (old, new))| (*at, *old, *new));
        all.filter(|(_, old, new)| old != new)
    }
}

/// Which child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The one before its parent.
    Left,
    /// The one behind it.
    Right,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Left => Self::Right,
            Self::Right => Self::Left,
        }
    }
}

/// Offsets into `struct rb_node`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NodeLayout {
    pub(super) parent: u64,
    pub(super) left: u64,
    pub(super) right: u64,
}

/// One tree. A node is the address of its `struct rb_node`, and zero is none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tree {
    /// Where the address of the first node is.
    pub(super) root: Gva,
    pub(super) layout: NodeLayout,
}

fn unsound(at: u64, value: u64) -> KernelError {
    KernelError::Unsound {
        what: "tree of modules",
        at: Gva(at),
        value,
    }
}

impl Tree {
    /// Puts `node` in, where `side` says that it goes from each node that is met.
    pub(super) fn insert(
        self,
        draft: &mut Draft<'_>,
        node: u64,
        mut side: impl FnMut(&mut Draft<'_>, u64) -> Result<Side, KernelError>,
    ) -> Result<(), KernelError> {
        let (mut parent, mut to) = (0, Side::Left);
        let mut at = draft.get(self.root)?;
        for _ in 0..MAX_DEPTH {
            if at == 0 {
                break;
            }
            self.linked(draft, at, parent)?;
            if at == node {
                return Err(unsound(parent, node));
            }
            to = side(draft, at)?;
            parent = at;
            at = self.child(draft, at, to)?;
        }
        if at != 0 {
            return Err(unsound(parent, at));
        }
        draft.set(word(node, self.layout.parent), parent)?;
        self.set_child(draft, node, Side::Left, 0)?;
        self.set_child(draft, node, Side::Right, 0)?;
        if parent == 0 {
            draft.set(self.root, node)?;
        } else {
            self.set_child(draft, parent, to, node)?;
        }
        self.balance_inserted(draft, node)
    }

    /// No red node has a red parent, from the new red `node` up.
    fn balance_inserted(self, draft: &mut Draft<'_>, mut node: u64) -> Result<(), KernelError> {
        for _ in 0..MAX_DEPTH {
            let mut parent = self.parent(draft, node)?;
            if parent == 0 {
                return self.set_red(draft, node, false);
            }
            if !self.is_red(draft, parent)? {
                return Ok(());
            }
            let above = self.parent(draft, parent)?;
            if above == 0 {
                return Err(unsound(parent, above));
            }
            let side = self.side_of(draft, parent, above)?;
            let uncle = self.child(draft, above, side.other())?;
            if self.is_red(draft, uncle)? {
                self.set_red(draft, parent, false)?;
                self.set_red(draft, uncle, false)?;
                self.set_red(draft, above, true)?;
                node = above;
                continue;
            }
            if self.child(draft, parent, side.other())? == node {
                self.rotate(draft, parent, side)?;
                parent = node;
            }
            self.rotate(draft, above, side.other())?;
            self.set_red(draft, parent, false)?;
            return self.set_red(draft, above, true);
        }
        Err(unsound(node, 0))
    }

    /// Takes `node` out. Its own words stay: who has come to it goes on from there.
    pub(super) fn erase(self, draft: &mut Draft<'_>, node: u64) -> Result<(), KernelError> {
        self.inside(draft, node)?;
        let left = self.child(draft, node, Side::Left)?;
        let right = self.child(draft, node, Side::Right)?;
        if left == 0 || right == 0 {
            let (only, parent) = (left | right, self.parent(draft, node)?);
            let red = self.is_red(draft, node)?;
            self.replace(draft, node, only)?;
            return if red {
                Ok(())
            } else {
                self.balance_erased(draft, only, parent)
            };
        }
        let next = self.first(draft, right, node)?;
        let red = self.is_red(draft, next)?;
        let only = self.child(draft, next, Side::Right)?;
        let mut parent = self.parent(draft, next)?;
        if parent == node {
            parent = next;
        } else {
            self.replace(draft, next, only)?;
            self.set_child(draft, next, Side::Right, right)?;
            self.set_parent(draft, right, next)?;
        }
        self.replace(draft, node, next)?;
        self.set_child(draft, next, Side::Left, left)?;
        self.set_parent(draft, left, next)?;
        let old = self.is_red(draft, node)?;
        self.set_red(draft, next, old)?;
        if red {
            Ok(())
        } else {
            self.balance_erased(draft, only, parent)
        }
    }

    /// Every way down has as many black nodes: those through `node`, below `parent`, have one too few.
    fn balance_erased(
        self,
        draft: &mut Draft<'_>,
        mut node: u64,
        mut parent: u64,
    ) -> Result<(), KernelError> {
        for _ in 0..MAX_DEPTH {
            if parent == 0 || self.is_red(draft, node)? {
                return self.set_red(draft, node, false);
            }
            let side = self.side_of(draft, node, parent)?;
            let mut sibling = self.sibling(draft, parent, side)?;
            if self.is_red(draft, sibling)? {
                self.set_red(draft, sibling, false)?;
                self.set_red(draft, parent, true)?;
                self.rotate(draft, parent, side)?;
                sibling = self.sibling(draft, parent, side)?;
            }
            let near = self.child(draft, sibling, side)?;
            let far = self.child(draft, sibling, side.other())?;
            let (near_red, far_red) = (self.is_red(draft, near)?, self.is_red(draft, far)?);
            if !near_red && !far_red {
                self.set_red(draft, sibling, true)?;
                (node, parent) = (parent, self.parent(draft, parent)?);
                continue;
            }
            if !far_red {
                self.set_red(draft, near, false)?;
                self.set_red(draft, sibling, true)?;
                self.rotate(draft, sibling, side.other())?;
                sibling = near;
            }
            let red = self.is_red(draft, parent)?;
            self.set_red(draft, sibling, red)?;
            self.set_red(draft, parent, false)?;
            let far = self.child(draft, sibling, side.other())?;
            self.set_red(draft, far, false)?;
            return self.rotate(draft, parent, side);
        }
        Err(unsound(node, parent))
    }

    /// All nodes in order, if it is a tree of at most `most` nodes as it has to be: links both ways, no red node below a red
    /// one, and as many black ones on every way down.
    pub(super) fn nodes(self, draft: &mut Draft<'_>, most: usize) -> Result<Vec<u64>, KernelError> {
        let mut nodes = Vec::new();
        let (mut ways, mut black) = (Vec::new(), 0);
        let (mut at, mut parent) = (draft.get(self.root)?, 0);
        let mut leaf = None;
        loop {
            while at != 0 {
                if ways.len() >= MAX_DEPTH || nodes.len() + ways.len() >= most {
                    return Err(unsound(parent, at));
                }
                self.linked(draft, at, parent)?;
                let red = self.is_red(draft, at)?;
                if red && (parent == 0 || self.is_red(draft, parent)?) {
                    return Err(unsound(parent, at));
                }
                ways.push((at, black));
                black += usize::from(!red);
                parent = at;
                at = self.child(draft, at, Side::Left)?;
            }
            if *leaf.get_or_insert(black) != black {
                return Err(unsound(parent, black as u64));
            }
            let Some((node, above)) = ways.pop() else {
                return Ok(nodes);
            };
            nodes.push(node);
            parent = node;
            black = above + usize::from(!self.is_red(draft, node)?);
            at = self.child(draft, node, Side::Right)?;
        }
    }

    /// `node` is one of the tree's: the ways between it and the root lead in both directions.
    fn inside(self, draft: &mut Draft<'_>, node: u64) -> Result<(), KernelError> {
        let mut at = node;
        for _ in 0..MAX_DEPTH {
            let parent = self.parent(draft, at)?;
            if parent == 0 {
                let root = draft.get(self.root)?;
                return (root == at).then_some(()).ok_or_else(|| unsound(at, root));
            }
            let left = self.child(draft, parent, Side::Left)?;
            if left != at && self.child(draft, parent, Side::Right)? != at {
                return Err(unsound(parent, at));
            }
            at = parent;
        }
        Err(unsound(node, at))
    }

    /// The first node of the part of the tree that begins with `at`, below `parent`.
    fn first(self, draft: &mut Draft<'_>, at: u64, parent: u64) -> Result<u64, KernelError> {
        let (mut at, mut parent) = (at, parent);
        for _ in 0..MAX_DEPTH {
            self.linked(draft, at, parent)?;
            let left = self.child(draft, at, Side::Left)?;
            if left == 0 {
                return Ok(at);
            }
            (parent, at) = (at, left);
        }
        Err(unsound(parent, at))
    }

    /// `node` says that it is below `parent`.
    fn linked(self, draft: &mut Draft<'_>, node: u64, parent: u64) -> Result<(), KernelError> {
        if self.parent(draft, node)? == parent {
            Ok(())
        } else {
            Err(unsound(node, parent))
        }
    }

    /// Turns `node` towards `side`: its other child takes its place, and it becomes that one's child.
    fn rotate(self, draft: &mut Draft<'_>, node: u64, side: Side) -> Result<(), KernelError> {
        let rises = self.sibling(draft, node, side)?;
        self.linked(draft, rises, node)?;
        let moves = self.child(draft, rises, side)?;
        self.replace(draft, node, rises)?;
        self.set_child(draft, node, side.other(), moves)?;
        if moves != 0 {
            self.set_parent(draft, moves, node)?;
        }
        self.set_child(draft, rises, side, node)?;
        self.set_parent(draft, node, rises)
    }

    /// What is above `old` has `new` in its place.
    fn replace(self, draft: &mut Draft<'_>, old: u64, new: u64) -> Result<(), KernelError> {
        let parent = self.parent(draft, old)?;
        if parent == 0 {
            draft.set(self.root, new)?;
        } else {
            let side = self.side_of(draft, old, parent)?;
            self.set_child(draft, parent, side, new)?;
        }
        if new == 0 {
            return Ok(());
        }
        self.set_parent(draft, new, parent)
    }

    /// The child of `parent` that is not on `side`, which must be there.
    fn sibling(self, draft: &mut Draft<'_>, parent: u64, side: Side) -> Result<u64, KernelError> {
        match self.child(draft, parent, side.other())? {
            0 => Err(unsound(parent, 0)),
            sibling => Ok(sibling),
        }
    }

    fn side_of(self, draft: &mut Draft<'_>, node: u64, parent: u64) -> Result<Side, KernelError> {
        if self.child(draft, parent, Side::Left)? == node {
            Ok(Side::Left)
        } else if self.child(draft, parent, Side::Right)? == node {
            Ok(Side::Right)
        } else {
            Err(unsound(parent, node))
        }
    }

    fn child(self, draft: &mut Draft<'_>, node: u64, side: Side) -> Result<u64, KernelError> {
        draft.get(word(node, self.of(side)))
    }

    fn set_child(
        self,
        draft: &mut Draft<'_>,
        node: u64,
        side: Side,
        child: u64,
    ) -> Result<(), KernelError> {
        draft.set(word(node, self.of(side)), child)
    }

    fn of(self, side: Side) -> u64 {
        match side {
            Side::Left => self.layout.left,
            Side::Right => self.layout.right,
        }
    }

    fn parent(self, draft: &mut Draft<'_>, node: u64) -> Result<u64, KernelError> {
        Ok(draft.get(word(node, self.layout.parent))? & !FLAGS)
    }

    fn set_parent(self, draft: &mut Draft<'_>, node: u64, parent: u64) -> Result<(), KernelError> {
        let at = word(node, self.layout.parent);
        let colour = draft.get(at)? & FLAGS;
        draft.set(at, parent | colour)
    }

    /// What is no node is black.
    fn is_red(self, draft: &mut Draft<'_>, node: u64) -> Result<bool, KernelError> {
        Ok(node != 0 && draft.get(word(node, self.layout.parent))? & BLACK == 0)
    }

    fn set_red(self, draft: &mut Draft<'_>, node: u64, red: bool) -> Result<(), KernelError> {
        if node == 0 {
            return Ok(());
        }
        let at = word(node, self.layout.parent);
        let parent = draft.get(at)? & !BLACK;
        draft.set(at, parent | if red { 0 } else { BLACK })
    }
}

fn word(node: u64, offset: u64) -> Gva {
    Gva(node.wrapping_add(offset))
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::{Draft, NodeLayout, Side, Tree};
    use crate::addr::Gva;
    use crate::kernel::locate::KernelError;

    const ROOT: Gva = Gva(0x100);
    const TREE: Tree = Tree {
        root: ROOT,
        layout: NodeLayout {
            parent: 0,
            right: 8,
            left: 16,
        },
    };

    /// A guest's memory that holds nothing but words.
    #[derive(Clone, Default)]
    struct Words(BTreeMap<Gva, u64>);

    impl Words {
        /// Does `change` to it, and tells how many words that wrote.
        fn change(
            &mut self,
            change: impl FnOnce(&mut Draft<'_>) -> Result<(), KernelError>,
        ) -> Result<usize, KernelError> {
            let read = |at: Gva| Ok(self.0.get(&at).copied().unwrap_or(0));
            let mut draft = Draft::new(&read);
            change(&mut draft)?;
            let changes: Vec<_> = draft.changes().collect();
            for (at, _, new) in &changes {
                self.0.insert(*at, *new);
            }
            Ok(changes.len())
        }

        fn insert(&mut self, key: u64) -> Result<usize, KernelError> {
            self.change(|draft| {
                TREE.insert(draft, node(key), |_, at| {
                    Ok(if node(key) < at {
                        Side::Left
                    } else {
                        Side::Right
                    })
                })
            })
        }

        fn erase(&mut self, key: u64) -> Result<usize, KernelError> {
            self.change(|draft| TREE.erase(draft, node(key)))
        }

        fn nodes(&self) -> Result<Vec<u64>, KernelError> {
            let read = |at: Gva| Ok(self.0.get(&at).copied().unwrap_or(0));
            TREE.nodes(&mut Draft::new(&read), 1000)
        }
    }

    fn node(key: u64) -> u64 {
        0x1000 + key * 24
    }

    proptest! {
        #[test]
        fn it_stays_a_tree_and_in_order(steps in proptest::collection::vec((0_u64..48, any::<bool>()), 0..300)) {
            let (mut words, mut model) = (Words::default(), BTreeSet::new());
            for (key, _) in steps {
                let written = if model.contains(&key) {
                    model.remove(&key);
                    words.erase(key).unwrap()
                } else {
                    model.insert(key);
                    words.insert(key).unwrap()
                };
                // A change is local: some words at each level.
                prop_assert!(written <= 60, "{written}");
                let want: Vec<u64> = model.iter().map(|key| node(*key)).collect();
                prop_assert_eq!(words.nodes().unwrap(), want);
            }
        }

        #[test]
        fn what_is_no_tree_ends(
            keys in proptest::collection::btree_set(0_u64..48, 1..40),
            damage in proptest::collection::vec((0_u64..144, 0_u64..144), 1..8),
        ) {
            let mut words = Words::default();
            for key in &keys {
                words.insert(*key).unwrap();
            }
            for (at, to) in damage {
                words.0.insert(Gva(0x1000 + at * 8), 0x1000 + to * 8);
            }
            // An answer or an error, but an end, and nothing beyond a few words.
            let _ = words.nodes();
            let mut other = words.clone();
            prop_assert!(other.insert(50).is_ok_and(|written| written < 400) || words.insert(50).is_err());
            if let Some(key) = keys.first() {
                let _ = words.erase(*key);
            }
        }
    }

    #[test]
    fn what_is_not_in_it_is_not_taken_out() {
        let mut words = Words::default();
        assert!(words.erase(3).is_err());
        words.insert(3).unwrap();
        assert!(words.insert(3).is_err(), "it is there already");
        assert!(words.erase(4).is_err());
        // The same tree with both children red, and with a black node too many on one side.
        for key in [1, 5, 0, 9] {
            words.insert(key).unwrap();
        }
        assert_eq!(words.nodes().unwrap(), [0, 1, 3, 5, 9].map(node));
        for (key, flip) in [(3, 1), (0, 1), (1, 1)] {
            let mut damaged = words.clone();
            *damaged.0.entry(Gva(node(key))).or_default() ^= flip;
            assert!(damaged.nodes().is_err(), "{key}");
        }
    }
}
