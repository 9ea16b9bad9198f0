//go:build linux

package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"keybroker/derive"
	"keybroker/inject"
	"keybroker/inject/sink"
	"keybroker/internal/tomlfile"
)

const (
	defaultDeadline = 10 * time.Minute
	maxDeadline     = 24 * time.Hour
	defaultLength   = 32
	maxConfig       = 64 << 10 // octets
	maxPins         = 4
	maxKeys         = inject.MaxWant / 2 // a volume may need its earlier epoch's key too
)

// Sinks by their names in the configuration.
const (
	sinkLUKS    = "luks"
	sinkKeyring = "keyring"
	sinkFile    = "file"
)

// config is what the guest's administrator decides: whom to believe, which keys to ask for, and where each goes.
type config struct {
	Tier     string
	Pins     []inject.Pin
	Subject  string // "": the firmware's UUID where there is one, else, in tier vm, the broker's word
	Deadline time.Duration
	Keys     []keyConfig
}

// keyConfig is one [[key]].
type keyConfig struct {
	Name     string
	Sink     string
	Length   int
	Optional bool

	Device string // luks
	Mapper string // luks

	Type        string // keyring
	Description string // keyring
	Keyring     string // keyring

	Path string // file
}

// rawConfig is what a file or the kernel's command line says, before it is checked.
type rawConfig struct {
	Tier     string
	Broker   []string
	Subject  string
	Deadline string
	Keys     []keyConfig
}

// parseConfig reads the text of the file agent.toml. Errors name it, and the line where they are about one.
func parseConfig(file string, text []byte) (*config, error) {
	if len(text) > maxConfig {
		return nil, fmt.Errorf("%s: %d octets, expected at most %d", file, len(text), maxConfig)
	}
	t, err := tomlfile.Parse(file, text)
	if err != nil {
		return nil, err
	}
	var r rawConfig
	t.String("tier", &r.Tier)
	t.Strings("broker", &r.Broker)
	t.String("subject", &r.Subject)
	t.String("deadline", &r.Deadline)
	for _, k := range t.Tables("key") {
		r.Keys = append(r.Keys, readKey(k))
	}
	if err := t.Err(); err != nil {
		return nil, err
	}
	c, err := r.check()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return c, nil
}

func readKey(t *tomlfile.Table) (k keyConfig) {
	t.String("name", &k.Name)
	t.String("sink", &k.Sink)
	t.Int("length", &k.Length, 1, 1<<10)
	t.Bool("optional", &k.Optional)
	t.String("device", &k.Device)
	t.String("mapper", &k.Mapper)
	t.String("type", &k.Type)
	t.String("description", &k.Description)
	t.String("keyring", &k.Keyring)
	t.String("path", &k.Path)
	return k
}

var mapperPattern = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$`)

// check holds a configuration to its rules and fills in what may be left out.
func (r *rawConfig) check() (*config, error) {
	c := &config{Tier: r.Tier, Subject: r.Subject, Deadline: defaultDeadline, Keys: r.Keys}
	if c.Tier != inject.TierVM && c.Tier != inject.TierSNP {
		return nil, fmt.Errorf("tier %q, expected %q or %q", r.Tier, inject.TierVM, inject.TierSNP)
	}
	if c.Subject != "" && derive.CheckSubject(c.Subject) != nil {
		return nil, fmt.Errorf("subject %q, expected this domain's UUID in lower case, or nothing", c.Subject)
	}
	if err := c.setPins(r.Broker); err != nil {
		return nil, err
	}
	if err := c.setDeadline(r.Deadline); err != nil {
		return nil, err
	}
	return c, c.setKeys()
}

func (c *config) setPins(broker []string) error {
	if len(broker) == 0 || len(broker) > maxPins {
		return fmt.Errorf("%d pins in broker, expected 1 to %d: `keybroker identity` on the host prints the broker's", len(broker), maxPins)
	}
	for _, text := range broker {
		pin, err := inject.ParsePin(text)
		if err != nil {
			return fmt.Errorf("broker: %w", err)
		}
		if slices.Contains(c.Pins, pin) {
			return fmt.Errorf("broker: %v is there twice", pin)
		}
		c.Pins = append(c.Pins, pin)
	}
	return nil
}

func (c *config) setDeadline(text string) error {
	if text == "" {
		return nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 || d > maxDeadline {
		return fmt.Errorf("deadline %q, expected a time above 0 and up to 24h, as in 5m: the agent never waits for ever", text)
	}
	c.Deadline = d
	return nil
}

func (c *config) setKeys() error {
	if len(c.Keys) == 0 || len(c.Keys) > maxKeys {
		return fmt.Errorf("%d keys, expected 1 to %d", len(c.Keys), maxKeys)
	}
	names, places := map[string]bool{}, map[string]string{}
	for i := range c.Keys {
		k := &c.Keys[i]
		if derive.CheckKeyName(k.Name) != nil {
			return fmt.Errorf("key %d: name %q, expected 1 to 63 of a-z, 0-9, dot and dash", i+1, k.Name)
		}
		if names[k.Name] {
			return fmt.Errorf("key %s is there twice", k.Name)
		}
		names[k.Name] = true
		if err := k.check(); err != nil {
			return fmt.Errorf("key %s: %w", k.Name, err)
		}
		for _, p := range k.places() {
			if other := places[p]; other != "" {
				return fmt.Errorf("keys %s and %s both go to %s", other, k.Name, p)
			}
			places[p] = k.Name
		}
	}
	return nil
}

// check fills in defaults and refuses what its sink has no use for.
func (k *keyConfig) check() error {
	if k.Length == 0 {
		k.Length = defaultLength
	}
	if k.Length != 32 && k.Length != 64 {
		return fmt.Errorf("length %d, expected 32 or 64 octets", k.Length)
	}
	switch k.Sink {
	case sinkLUKS:
		return errors.Join(k.none(sinkLUKS, k.Type, k.Description, k.Keyring, k.Path), k.checkLUKS())
	case sinkKeyring:
		k.keyringDefaults()
		return errors.Join(k.none(sinkKeyring, k.Device, k.Mapper, k.Path), k.keyring().Check())
	case sinkFile:
		return errors.Join(k.none(sinkFile, k.Device, k.Mapper, k.Type, k.Description, k.Keyring), k.checkFile())
	}
	return fmt.Errorf("sink %q, expected luks, keyring or file", k.Sink)
}

func (k *keyConfig) none(sink string, others ...string) error {
	if slices.ContainsFunc(others, func(s string) bool { return s != "" }) {
		return fmt.Errorf("the sink %s takes %s, and something else is given", sink, sinkFields[sink])
	}
	return nil
}

var sinkFields = map[string]string{
	sinkLUKS:    "device and mapper",
	sinkKeyring: "type, description and keyring",
	sinkFile:    "path",
}

func (k *keyConfig) checkLUKS() error {
	if !cleanPath(k.Device) || !strings.HasPrefix(k.Device, "/dev/") {
		return fmt.Errorf("device %q, expected a path below /dev, as in /dev/vdb or /dev/disk/by-id/virtio-data", k.Device)
	}
	if !mapperPattern.MatchString(k.Mapper) || k.Mapper == "control" {
		return fmt.Errorf("mapper %q, expected a name of letters, digits, dot, dash and underscore: the volume appears below /dev/mapper", k.Mapper)
	}
	return nil
}

func (k *keyConfig) checkFile() error {
	if !cleanPath(k.Path) || len(filepath.Base(k.Path)) > 200 {
		return fmt.Errorf("path %q, expected an absolute path on a tmpfs, as in /run/keys/app", k.Path)
	}
	return nil
}

// cleanPath wants an absolute path with no detours and nothing that does not print.
func cleanPath(p string) bool {
	odd := func(r rune) bool { return r <= ' ' || r == 0x7f || r == utf8.RuneError }
	return filepath.IsAbs(p) && filepath.Clean(p) == p && p != "/" && len(p) < 4096 && !strings.ContainsFunc(p, odd)
}

func (k *keyConfig) keyringDefaults() {
	if k.Description == "" {
		k.Description = "keybroker:" + k.Name
	}
	if k.Keyring == "" {
		k.Keyring = "@u"
	}
}

func (k *keyConfig) keyring() *sink.Keyring {
	return &sink.Keyring{Type: k.Type, Description: k.Description, Ring: k.Keyring}
}

// places are what no two keys may share.
func (k *keyConfig) places() []string {
	switch k.Sink {
	case sinkLUKS:
		return []string{k.Device, "/dev/mapper/" + k.Mapper}
	case sinkKeyring:
		return []string{k.Keyring + " " + k.Type + " " + k.Description}
	}
	return []string{k.Path}
}

// place names the sink for people, and tells whether a record of an earlier run is of this configuration.
func (k *keyConfig) place() string { return k.Sink + " " + strings.Join(k.places(), " as ") }
