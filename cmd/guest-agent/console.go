//go:build linux

package main

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// repeatAfter is how long a line that says nothing new is held back.
const repeatAfter = 30 * time.Second

// console writes one line for each step of a start. It is safe for concurrent use.
type console struct {
	out   io.Writer
	start time.Time

	mu    sync.Mutex
	seen  map[string]*repeats
	steps []timedStep
}

// timedStep is one step on the way to the keys, and how long after the start it was done.
type timedStep struct {
	name string
	at   time.Duration
}

// repeats counts lines of one kind that were held back.
type repeats struct {
	last time.Time
	text string
	held int
}

func newConsole(out io.Writer) *console {
	return &console{out: out, start: time.Now(), seen: map[string]*repeats{}}
}

// say writes a line.
func (c *console) say(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.write(fmt.Sprintf(format, args...))
}

// sayOnce writes a line unless the last one of this kind was the same, not long ago; any other text of the kind is written,
// but never more than one line a second.
func (c *console) sayOnce(kind, format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	text := fmt.Sprintf(format, args...)
	r := c.seen[kind]
	if r == nil {
		r = &repeats{}
		c.seen[kind] = r
	}
	since := time.Since(r.last)
	if r.text == text && since < repeatAfter || since < time.Second && !r.last.IsZero() {
		r.held++
		return
	}
	line := text
	if r.held > 0 {
		line = fmt.Sprintf("%s (and %d more like this before)", text, r.held)
	}
	*r = repeats{last: time.Now(), text: text}
	c.write(line)
}

// mark notes that a step is done. One that is done again counts from then, and what came after it before does not.
func (c *console) mark(step string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for n, s := range c.steps {
		if s.name == step {
			c.steps = c.steps[:n]
			break
		}
	}
	c.steps = append(c.steps, timedStep{step, time.Since(c.start)})
}

// sayTimes writes when each step was done, for who wants to know what a boot waited for.
func (c *console) sayTimes() {
	c.mu.Lock()
	defer c.mu.Unlock()
	var times []string
	for _, s := range c.steps {
		times = append(times, fmt.Sprintf("%s %.3f s", s.name, s.at.Seconds()))
	}
	if len(times) > 0 {
		c.write("times after the start: " + strings.Join(times, ", "))
	}
}

func (c *console) write(line string) { fmt.Fprintf(c.out, "keybroker-agent: %s\n", line) }

// age is the time since the start, for people: "0.4 s".
func (c *console) age() string { return fmt.Sprintf("%.1f s", time.Since(c.start).Seconds()) }
