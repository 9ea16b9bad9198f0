// Package plain is foreign text made fit for one line of a terminal or a log: nothing in it steers, hides or turns around what
// stands beside it.
package plain

import (
	"strconv"
	"strings"
	"unicode/utf8"
)

// Line returns s as one line: the ends of lines and tabs are blanks, and what does not print is U+FFFD: control characters,
// those that change the direction of text, and bad UTF-8.
func Line(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\r' || r == '\t':
			return ' '
		case !strconv.IsPrint(r):
			return utf8.RuneError
		}
		return r
	}, s)
}

// Short is Line of at most so many octets, with a mark where something is missing.
func Short(s string, most int) string {
	if s = Line(s); len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}
