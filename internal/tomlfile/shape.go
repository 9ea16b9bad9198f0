package tomlfile

import "fmt"

// Bounds of what the decoder is given: its memory grows with the square of a key's parts, and of how deep values nest.
const (
	maxParts   = 16      // of a key or a table's header
	maxKey     = 1 << 10 // octets of either
	maxNesting = 16      // lists and inline tables within one another
)

// shape is a walk over text of which nobody knows yet whether it is TOML. As far as it is, the walk sees the keys and brackets
// that the decoder does; where it ceases to be, the decoder stops.
type shape struct {
	scanner
	start   int // of what may be a key
	dots    int // since start
	depth   int
	inValue bool // behind a key's "="
}

// checkShape returns what is too large in a text for the decoder, and its line; or "".
func checkShape(text string) (line int, wrong string) {
	s := &shape{scanner: scanner{text: text, line: 1}}
	for s.more() {
		line = s.line
		if wrong := s.step(); wrong != "" {
			return line, wrong
		}
	}
	return 0, ""
}

// step moves over one string, comment or octet. A value outside of strings has one dot at most, so more than that are a key's.
func (s *shape) step() (wrong string) {
	c := s.peek()
	switch c {
	case '"', '\'':
		s.skipString()
		return ""
	case '#':
		s.skipLine()
		return ""
	case '.':
		s.dots++
	case '[', '{':
		s.depth++
	case ']', '}':
		s.depth--
	}
	long := s.pos-s.start > maxKey && (c == '=' || c == ']' && !s.inValue)
	s.next()
	switch {
	case long || s.dots >= maxParts:
		return fmt.Sprintf("expected a key of at most %d parts and %d octets", maxParts, maxKey)
	case s.depth > maxNesting:
		return fmt.Sprintf("expected at most %d lists and tables within one another", maxNesting)
	}
	s.delimit(c)
	return ""
}

// delimit begins anew behind what ends a key or a value.
func (s *shape) delimit(c byte) {
	switch c {
	case '=':
		s.inValue = true
	case '\n':
		s.inValue = s.inValue && s.depth > 0
	case '[', ']', '{', '}', ',':
	default:
		return
	}
	s.start, s.dots = s.pos, 0
}
