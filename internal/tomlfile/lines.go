package tomlfile

import (
	"strconv"
	"strings"
)

// A node is where a key or table stands in the text. The decoder keeps no lines, so index finds them again.
type node struct {
	line     int
	children map[string]*node
	elems    []*node // of [[key]]: one for each
}

// child returns the node of a part of a key, made at this line if it is new; of an array of tables, its last element.
func (n *node) child(part string, line int) *node {
	c := n.children[part]
	if c == nil {
		c = &node{line: line}
		if n.children == nil {
			n.children = map[string]*node{}
		}
		n.children[part] = c
	}
	return c
}

func (n *node) last() *node {
	if len(n.elems) > 0 {
		return n.elems[len(n.elems)-1]
	}
	return n
}

// descend follows a key of several parts, into the last element of each array of tables on the way.
func (n *node) descend(parts []string, line int) *node {
	for _, p := range parts {
		n = n.last().child(p, line)
	}
	return n
}

// index finds the line of every key and table of a text that the decoder has taken. It looks at statements only: what is
// within a value has the line of its key.
func index(text string) *node {
	s := &scanner{text: strings.TrimPrefix(text, "\ufeff"), line: 1}
	root := &node{line: 1}
	current := root
	for s.skipBlank() {
		line := s.line
		switch {
		case strings.HasPrefix(s.rest(), "[["):
			s.pos += 2
			array := root.descend(s.key(), line)
			current = &node{line: line}
			array.elems = append(array.elems, current)
		case s.peek() == '[':
			s.pos++
			current = root.descend(s.key(), line).last()
			current.line = line // it may have been made by a [table.sub] before it
		default:
			current.descend(s.key(), line)
			s.skipValue()
		}
		s.skipLine()
	}
	return root
}

// A scanner walks over TOML that is known to be right, so it checks nothing. Every step moves on.
type scanner struct {
	text string
	pos  int
	line int
}

func (s *scanner) rest() string { return s.text[min(s.pos, len(s.text)):] }

func (s *scanner) peek() byte {
	if s.pos < len(s.text) {
		return s.text[s.pos]
	}
	return 0
}

// next returns the octet here and moves past it.
func (s *scanner) next() byte {
	c := s.peek()
	s.pos++
	if c == '\n' {
		s.line++
	}
	return c
}

func (s *scanner) more() bool { return s.pos < len(s.text) }

// skipBlank moves to the next statement and reports whether there is one.
func (s *scanner) skipBlank() bool {
	for s.more() {
		switch s.peek() {
		case ' ', '\t', '\r', '\n':
			s.next()
		case '#':
			s.skipLine()
		default:
			return true
		}
	}
	return false
}

// skipLine moves to the end of the line.
func (s *scanner) skipLine() {
	for s.more() && s.peek() != '\n' {
		s.next()
	}
}

// key reads a key of several parts, up to and with the "=" or "]" behind it.
func (s *scanner) key() []string {
	var parts []string
	for s.more() {
		switch c := s.peek(); {
		case c == '"' || c == '\'':
			start := s.pos
			s.skipString()
			parts = append(parts, unquote(s.text[start:min(s.pos, len(s.text))]))
		case isBare(c):
			start := s.pos
			for isBare(s.peek()) {
				s.pos++
			}
			parts = append(parts, s.text[start:s.pos])
		case c == '=' || c == ']' || c == '\n':
			s.next()
			return parts
		default:
			s.next()
		}
	}
	return parts
}

// isBare reports whether c may stand in a key that is not quoted.
func isBare(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '-'
}

func unquote(s string) string {
	if strings.HasPrefix(s, "'") {
		return strings.Trim(s, "'")
	}
	if u, err := strconv.Unquote(s); err == nil {
		return u
	}
	return s
}

// skipValue moves behind a value: to the end of its last line.
func (s *scanner) skipValue() {
	for depth := 0; s.more(); {
		switch s.peek() {
		case '"', '\'':
			s.skipString()
			continue
		case '#':
			s.skipLine()
			continue
		case '[', '{':
			depth++
		case ']', '}':
			depth--
		case '\n':
			if depth <= 0 {
				return
			}
		}
		s.next()
	}
}

// skipString moves behind a string of any of the four kinds.
func (s *scanner) skipString() {
	q := s.peek()
	end := string(q)
	if long := strings.Repeat(end, 3); strings.HasPrefix(s.rest(), long) {
		end = long
	}
	for range end {
		s.next()
	}
	for s.more() && !strings.HasPrefix(s.rest(), end) {
		if s.next() == '\\' && q == '"' {
			s.next()
		}
	}
	for range end {
		s.next()
	}
	for i := 0; i < 2 && len(end) == 3 && s.peek() == q; i++ {
		s.next() // up to two quotes may stand before the closing three
	}
}
