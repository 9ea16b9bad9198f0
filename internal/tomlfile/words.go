package tomlfile

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// typeName says what a value is, without the value.
func typeName(v any) string {
	switch v := v.(type) {
	case string:
		return got(v)
	case int64:
		return "a whole number"
	case float64:
		return "a number with a fraction"
	case bool:
		return strconv.FormatBool(v)
	case time.Time:
		return "a date"
	case []any:
		return "a list"
	case map[string]any:
		return "a table"
	case []map[string]any:
		return "an array of tables"
	}
	return "something else"
}

// got describes a string by its length: the text may be a secret in the wrong place.
func got(s string) string {
	if s == "" {
		return "an empty string"
	}
	return fmt.Sprintf("a string of %d characters", len([]rune(s)))
}

// shown returns a key as messages show it: only what looks like the name of a setting, and not for long.
func shown(key string) string {
	for _, r := range key {
		if !isBare(byte(r)) || r > 126 {
			return "(not a name)"
		}
	}
	if key == "" || len(key) > 30 {
		return "(not a name)"
	}
	return strconv.Quote(key)
}

func quoteAll(words []string) string {
	var out []string
	for _, w := range words {
		out = append(out, strconv.Quote(w))
	}
	return strings.Join(out, ", ")
}

// nearest returns the known key that an unknown one was probably meant to be, or "".
func nearest(key string, known []string) string {
	for _, k := range known {
		if strings.EqualFold(key, k) {
			return k
		}
	}
	for _, k := range known {
		if len(k) > 2 && distance(strings.ToLower(key), k) <= 2 && distance(key, k) < len(k)/2+1 {
			return k
		}
	}
	return ""
}

// distance is how many letters must be put in, taken out or replaced to make b of a. Long words are not compared.
func distance(a, b string) int {
	if len(a) > 40 || len(b) > 40 {
		return 40
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
