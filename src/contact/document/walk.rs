//! What the readers share: from a stream of tags to a [`Document`].

use std::borrow::Cow;
use std::ops::Range;

use encoding_rs::{Encoding, UTF_8};
use quick_xml::events::attributes::Attributes;

use super::{Contact, Document, Fit, List, MAX_DEPTH, Node, OwnId, Spelling, TagFit, Time};
use crate::contact::edit::{Bridge, Span};
use crate::contact::{ID_ORIGIN, Source, Uninspectable, value};

/// How long a list is at least, as clients write it, in bytes.
const SHORTEST_LIST: usize = 128;

/// How many sources there is room for in a contact at first.
const FEW: usize = 8;

/// An element that is open.
pub(super) struct Open {
    /// Its qualified name, in the text.
    pub name: Range<usize>,
    kind: Element,
    contact: Option<u32>,
    list: Option<u32>,
    /// Where its content starts.
    content: usize,
    has_children: bool,
    /// It stands in an element that an edit may replace as a whole: nothing in it is looked at, so
    /// that edits never overlap.
    sealed: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Element {
    Contact,
    Lists,
    List,
    Source,
    Time,
    Id,
    Other,
}

/// The local names that matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name {
    OptInSource,
    OptInTime,
    ContactList,
    ContactLists,
    Contact,
    Id,
    Other,
}

impl Name {
    pub fn of(local: &[u8]) -> Self {
        match local {
            b"OptInSource" => Self::OptInSource,
            b"OptInTime" => Self::OptInTime,
            b"ContactList" => Self::ContactList,
            b"ContactLists" => Self::ContactLists,
            b"Contact" => Self::Contact,
            b"id" => Self::Id,
            _ => Self::Other,
        }
    }
}

/// A start tag as a reader sees it.
pub(super) struct Tag {
    /// From `<` to behind `>`.
    pub span: Range<usize>,
    pub name: Range<usize>,
    /// What its local part is.
    pub known: Name,
    pub self_closing: bool,
}

/// The state of one pass over a text.
pub(super) struct Walk<'t> {
    /// What names are read from. Of a legacy charset, only ASCII is the body's own.
    text: &'t str,
    /// The same stretch of the body itself: what values are read from.
    bytes: &'t [u8],
    /// Where `text` starts in the body.
    base: usize,
    own_host: Option<&'t str>,
    /// What the body is read as, if not as UTF-8.
    pub legacy: Option<&'static Encoding>,
    pub open: Vec<Open>,
    roots: usize,
    found: Document,
}

impl<'t> Walk<'t> {
    pub fn new(text: &'t str, bytes: &'t [u8], base: usize, own_host: Option<&'t str>) -> Self {
        // Where the client used the API's own name, its ids need no restoring.
        let is_api = |host: &str| {
            let name = ID_ORIGIN.strip_prefix("http://");
            name.is_some_and(|name| name.eq_ignore_ascii_case(host))
        };
        Self {
            text,
            bytes,
            base,
            own_host: own_host.filter(|host| !is_api(host)),
            legacy: None,
            open: Vec::with_capacity(16),
            roots: 0,
            found: Document::default(),
        }
    }

    /// The document, if it ended as it should: with all elements closed, and exactly one root.
    pub fn finish(self) -> Result<Document, Uninspectable> {
        if !self.open.is_empty() || self.roots != 1 {
            return Err(Uninspectable::Malformed);
        }
        Ok(self.found)
    }

    /// Notes a start tag. `is_ours` tells whether its name is in the contact schema's namespace, `id`
    /// where the value of its `id` attribute stands; both are asked only if it matters.
    #[inline]
    pub fn start(
        &mut self,
        tag: Tag,
        is_ours: impl Fn() -> bool,
        id: impl FnOnce() -> Option<Range<usize>>,
    ) -> Result<(), Uninspectable> {
        if self.open.len() == MAX_DEPTH {
            return Err(Uninspectable::Depth);
        }
        let (parent, contact, list, sealed) = match self.open.last_mut() {
            Some(parent) => {
                parent.has_children = true;
                let replaceable = matches!(parent.kind, Element::Source | Element::Time);
                (parent.kind, parent.contact, parent.list, parent.sealed || replaceable)
            }
            None => {
                self.roots += 1;
                (Element::Other, None, None, false)
            }
        };
        let mut open = Open {
            name: tag.name.clone(),
            kind: Element::Other,
            contact,
            list,
            content: tag.span.end,
            has_children: false,
            sealed,
        };
        if !sealed {
            self.classify(&tag, &mut open, parent, is_ours);
            let replaceable = matches!(open.kind, Element::Source | Element::Time);
            if (open.kind == Element::List || (self.own_host.is_some() && !replaceable))
                && let Some(id) = id()
            {
                if open.kind == Element::List
                    && let Some(list) = self.found.lists.last_mut()
                {
                    list.id = Some(Span::new(id.start + self.base..id.end + self.base));
                }
                self.own_id(open.list, id);
            }
        }
        if tag.self_closing {
            self.close_empty(&tag, &open);
        } else {
            self.open.push(open);
        }
        Ok(())
    }

    #[inline]
    fn classify(
        &mut self,
        tag: &Tag,
        open: &mut Open,
        parent: Element,
        is_ours: impl Fn() -> bool,
    ) {
        match tag.known {
            Name::OptInSource
                if matches!(parent, Element::Contact | Element::List) && is_ours() =>
            {
                open.kind = Element::Source;
            }
            Name::OptInTime if parent == Element::List && is_ours() => open.kind = Element::Time,
            Name::ContactList => {
                if let Some(contact) = open.contact
                    && is_ours()
                {
                    self.found.contacts[contact as usize].holds_list = true;
                    if parent == Element::Lists {
                        open.kind = Element::List;
                        open.list = Some(self.list(contact, None, tag.span.start));
                    }
                }
            }
            Name::ContactLists if parent == Element::Contact && is_ours() => {
                open.kind = Element::Lists
            }
            Name::Contact if is_ours() => {
                open.kind = Element::Contact;
                open.contact = Some(self.found.contacts.len() as u32);
                open.list = None;
                // For a contact with few lists, which most are, once and for all.
                self.found.nodes.reserve(FEW);
                self.found.contacts.push(Contact {
                    tag: self.in_body(&tag.span),
                    name: self.text[tag.name.clone()].to_owned(),
                    self_closing: tag.self_closing,
                    holds_list: false,
                });
            }
            Name::Id => open.kind = Element::Id,
            _ => {}
        }
    }

    /// Notes a list that starts at `start`, and returns its number.
    #[inline]
    fn list(&mut self, contact: u32, id: Option<Span>, start: usize) -> u32 {
        let number = self.found.lists.len() as u32;
        if number == 0 {
            // Room for as many as the rest of the text may hold, rather than to copy them whenever there is none.
            self.found.lists.reserve_exact(1 + (self.text.len() - start) / SHORTEST_LIST);
        }
        self.found.lists.push(List { contact, id });
        number
    }

    /// The contact whose lists are being read: the innermost element holds them, and has room for what stands in them.
    #[inline]
    pub fn whose_lists(&self) -> Option<u32> {
        let open = self.open.last()?;
        let fits = self.open.len() + 2 <= MAX_DEPTH;
        open.contact.filter(|_| open.kind == Element::Lists && fits)
    }

    /// The contact and the list whose members are being read: the innermost element is a list, and has room for one more.
    #[inline]
    pub fn whose_list(&self) -> Option<(u32, u32)> {
        let open = self.open.last()?;
        let is_list = open.kind == Element::List && self.open.len() < MAX_DEPTH;
        open.contact.zip(open.list).filter(|_| is_list)
    }

    /// Notes a list in the contact's own namespace whose start tag says its id and nothing else. Whatever stands in it
    /// is told by its number, until it ends or is [opened](Self::open_list).
    #[inline]
    pub fn whole_list(&mut self, contact: u32, start: usize, id: Range<usize>) -> u32 {
        self.found.contacts[contact as usize].holds_list = true;
        let list = self.list(contact, Some(self.in_body(&id)), start);
        // No reference is in it, so it shows at once whether it is the API's own, as nearly all are.
        let value = self.bytes[id.clone()].trim_ascii_start();
        if self.own_host.is_some_and(|host| own_origin(value, host).is_some()) {
            self.own_id(Some(list), id);
        }
        list
    }

    /// Notes a list as [`Self::whole_list`] does, which is not the first, and whose id is not the proxy's own.
    #[inline]
    pub fn list_alike(&mut self, contact: u32, id: Range<usize>) -> u32 {
        self.found.contacts[contact as usize].holds_list = true;
        self.found.lists.push(List { contact, id: Some(self.in_body(&id)) });
        self.found.lists.len() as u32 - 1
    }

    /// The number at the end of an id in which no reference is, if what precedes it shows that it is not the proxy's own.
    pub fn number_of(&self, id: Range<usize>) -> Option<Range<usize>> {
        let value = &self.bytes[id.clone()];
        let before = value.iter().rposition(|byte| !byte.is_ascii_digit()).map_or(0, |it| it + 1);
        let before = &value[..before];
        let is_others = self.own_host.is_none_or(|host| {
            let start = before.trim_ascii_start();
            start.len() > "https://".len() + host.len() && own_origin(start, host).is_none()
        });
        is_others.then(|| id.start + before.len()..id.end)
    }

    /// Leaves a list open that [`Self::whole_list`] noted.
    pub fn open_list(&mut self, contact: u32, list: u32, name: Range<usize>, content: usize) {
        self.open.push(Open {
            name,
            kind: Element::List,
            contact: Some(contact),
            list: Some(list),
            content,
            has_children: false,
            sealed: false,
        });
    }

    /// Notes a list's source that is one of the two known values, and stands plainly in `element`.
    #[inline]
    pub fn list_source(&mut self, contact: u32, list: u32, source: Source, element: Range<usize>) {
        let slot = element.start + "<OptInSource>".len()..element.end - "</OptInSource>".len();
        let (element, slot) = (self.in_body(&element), self.in_body(&slot));
        let (list, spelling, fit) = (Some(list), Spelling::Known(source), Fit::Text(Bridge::None));
        self.found.nodes.push(Node { contact, list, element, spelling, slot, fit, copies: 0 });
    }

    /// How many sources there are so far.
    #[inline]
    pub fn sources(&self) -> usize {
        self.found.nodes.len()
    }

    /// Notes that the source of the list before `first` stands in that and in all lists after it too, or returns false if it is
    /// not the newest of so many.
    #[inline]
    pub fn extend_newest(&mut self, sources: usize, contact: u32, first: u32) -> bool {
        let is_newest = self.found.nodes.len() == sources;
        let copies = self.found.lists.len() as u32 - first;
        let node = self.found.nodes.last_mut().filter(|node| {
            let is_next = node.list.is_some_and(|own| own + node.copies + 1 == first);
            is_newest && is_next && node.contact == contact
        });
        node.map(|node| node.copies += copies).is_some()
    }

    /// Notes a list's time.
    #[inline]
    pub fn list_time(&mut self, list: u32, element: Range<usize>) {
        let element = self.in_body(&element);
        self.found.times.push(Time { list, element });
    }

    /// Notes an element that has neither attributes nor children nor a name that matters. False if it stands where
    /// there is more to know of it.
    #[inline]
    pub fn leaf(&mut self) -> bool {
        let fits = self.open.len() < MAX_DEPTH;
        match self.open.last_mut() {
            Some(parent) if fits => {
                parent.has_children = true;
                true
            }
            _ => false,
        }
    }

    fn close_empty(&mut self, tag: &Tag, open: &Open) {
        let end = tag.span.end;
        match open.kind {
            Element::Source => {
                let (slot, fit) = self.without_nil(open, end, end).unwrap_or_else(|| {
                    let (attributes, name) = ("".into(), self.text[tag.name.clone()].into());
                    (end - "/>".len()..end, Fit::Tag(Box::new(TagFit { attributes, name })))
                });
                self.node(open, end, Spelling::Empty, slot, fit);
            }
            Element::Time => self.time(open, end),
            _ => {}
        }
    }

    /// Notes the end tag of the innermost element, which a reader has held against its name.
    #[inline]
    pub fn end(&mut self, tag: Range<usize>) -> Result<(), Uninspectable> {
        let Some(open) = self.open.pop() else { return Err(Uninspectable::Malformed) };
        let content = open.content..tag.start;
        match open.kind {
            Element::Source if open.has_children => {
                let trimmed = value::trimmed(&self.bytes[content.clone()]);
                let slot = content.start + trimmed.start..content.start + trimmed.end;
                let spelling = Spelling::Other(self.decoded(&self.bytes[slot.clone()]).into());
                self.node(&open, tag.end, spelling, slot, Fit::Text(Bridge::None));
            }
            Element::Source => {
                let raw = &self.bytes[content.clone()];
                let value = value::read(raw, content.start).ok_or(Uninspectable::Malformed)?;
                let spelling = match Source::from_bytes(&value.text) {
                    Some(source) => Spelling::Known(source),
                    None if value.text.is_empty() => Spelling::Empty,
                    None => self.other(raw, &value.text),
                };
                let nil = match spelling {
                    Spelling::Empty => self.without_nil(&open, open.content, tag.end),
                    _ => None,
                };
                let (slot, fit) = nil.unwrap_or((value.span, Fit::Text(value.bridge)));
                self.node(&open, tag.end, spelling, slot, fit);
            }
            Element::Time => self.time(&open, tag.end),
            Element::Id if self.own_host.is_some() && !open.has_children => {
                self.own_id(open.list, content);
            }
            _ => {}
        }
        Ok(())
    }

    /// What a value says that is none of the known ones. Two that differ in letters of a legacy charset differ, and each is the same as
    /// if a reference stood for its letters.
    fn other(&self, raw: &[u8], text: &[u8]) -> Spelling {
        if self.legacy.is_some()
            && let Some(value) = value::read(self.decoded(raw).as_bytes(), 0)
        {
            return Spelling::Other(String::from_utf8_lossy(&value.text).into());
        }
        Spelling::Other(String::from_utf8_lossy(text).into())
    }

    fn decoded<'b>(&self, raw: &'b [u8]) -> Cow<'b, str> {
        self.legacy.unwrap_or(UTF_8).decode_without_bom_handling(raw).0
    }

    /// Where a value goes into an empty element that says `xsi:nil="true"`, whose start tag ends at `content` and which
    /// itself ends at `end`: with a value in it, it must not say so (XML Schema part 1 section 3.3.4).
    fn without_nil(&self, open: &Open, content: usize, end: usize) -> Option<(Range<usize>, Fit)> {
        let tag = &self.text[open.name.start - 1..content];
        // Nearly none has any attribute.
        if tag.len() == 1 + open.name.len() + 1 || !tag.contains(":nil") {
            return None;
        }
        let inside = tag.strip_suffix("/>").or(tag.strip_suffix('>'))?;
        let nil = Attributes::new(inside, 1 + open.name.len())
            .with_checks(false)
            .map_while(Result::ok)
            .find(|attribute| attribute.key.local_name().as_ref() == "nil")?;
        let (Cow::Borrowed(value), key) = (&nil.value, nil.key.as_ref()) else { return None };
        if !matches!(value.trim(), "true" | "1") {
            return None;
        }
        // quick-xml tells no spans of attributes, but hands out slices of its input.
        let at = |part: &str| part.as_ptr() as usize - tag.as_ptr() as usize;
        let before = inside[..at(key)].trim_end_matches(|char: char| char.is_ascii_whitespace());
        let attributes = inside.get(at(value) + value.len() + 1..)?;
        let start = open.name.start - 1 + before.len();
        // What cannot be written as it was is not written at all.
        let is_own = self.bytes[start..content] == self.text.as_bytes()[start..content];
        let name = self.text[open.name.clone()].into();
        let tag = TagFit { attributes: attributes.into(), name };
        is_own.then(|| (start..end, Fit::Tag(Box::new(tag))))
    }

    fn node(&mut self, open: &Open, end: usize, spelling: Spelling, slot: Range<usize>, fit: Fit) {
        // A Source is only ever opened inside a Contact.
        let Some(contact) = open.contact else { return };
        let element = self.in_body(&(open.name.start - 1..end));
        let slot = self.in_body(&slot);
        let list = open.list;
        self.found.nodes.push(Node { contact, list, element, spelling, slot, fit, copies: 0 });
    }

    fn time(&mut self, open: &Open, end: usize) {
        if let Some(list) = open.list {
            self.list_time(list, open.name.start - 1..end);
        }
    }

    /// Notes an id if its value is `http(s)://` and the own host, then `/` or its end.
    fn own_id(&mut self, list: Option<u32>, content: Range<usize>) {
        let Some(host) = self.own_host else { return };
        let raw = &self.bytes[content.clone()];
        // Nearly all ids are the API's own, and written plainly: that shows at their start.
        let start = raw.trim_ascii_start();
        let start = &start[..start.len().min("https://".len() + host.len() + 1)];
        if memchr::memchr2(b'<', b'&', start).is_none() && own_origin(start, host).is_none() {
            return;
        }
        let Some(value) = value::read(raw, content.start) else { return };
        let Some(length) = own_origin(&value.text, host) else { return };
        if let Some((origin, bridge)) = value.head(raw, content.start, length) {
            let origin = self.in_body(&origin);
            let written = String::from_utf8_lossy(&value.text[..length]).into();
            self.found.own_ids.push(OwnId { list, origin, written, bridge });
        }
    }

    fn in_body(&self, span: &Range<usize>) -> Span {
        Span::new(span.start + self.base..span.end + self.base)
    }
}

/// The length of the origin at the start of `value`, if it is the own one.
fn own_origin(value: &[u8], host: &str) -> Option<usize> {
    let scheme = if matches!(value.get(4)?, b's' | b'S') { "https://" } else { "http://" };
    let length = scheme.len() + host.len();
    let authority = value.get(scheme.len()..length)?;
    // Nearly all differ in the first letter of the host.
    let differs = |(one, other): (&u8, &u8)| !one.eq_ignore_ascii_case(other);
    if authority.first().zip(host.as_bytes().first()).is_some_and(differs) {
        return None;
    }
    let ends = matches!(value.get(length), None | Some(b'/'));
    let same = authority.eq_ignore_ascii_case(host.as_bytes());
    (ends && same && value[..scheme.len()].eq_ignore_ascii_case(scheme.as_bytes()))
        .then_some(length)
}
