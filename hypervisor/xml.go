package hypervisor

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// Namespace is that of our element in a domain's <metadata>.
const Namespace = "urn:keybroker:domain:1"

// MaxDomainXML is the most octets of a domain's definition that are read.
const MaxDomainXML = 1 << 20

const (
	maxDepth = 64   // of elements
	maxText  = 1024 // octets of a name or UUID
)

// ParseDomain reads libvirt's definition of a domain: UUID, name, vsock address and our metadata. Everything else in it is
// skipped. It refuses what is over MaxDomainXML octets or 64 elements deep, has a document type, repeats what it reads, or
// has anything in our namespace that it does not know. With an error the domain is empty.
func ParseDomain(data []byte) (Domain, error) {
	return parseDomain(data, true)
}

// ParseCID reads the vsock address alone, 0 for none, with ParseDomain's bounds but without judging our metadata: a mistake
// in one domain's metadata says nothing about whose address this is.
func ParseCID(data []byte) (uint32, error) {
	d, err := parseDomain(data, false)
	return d.CID, err
}

func parseDomain(data []byte, judge bool) (Domain, error) {
	if len(data) > MaxDomainXML {
		return Domain{}, fmt.Errorf("reading domain XML: more than %d octets", MaxDomainXML)
	}
	p := &domainParser{dec: xml.NewDecoder(bytes.NewReader(data)), judge: judge, stack: []element{document}}
	if err := p.run(); err != nil {
		return Domain{}, fmt.Errorf("reading domain XML: %w", err)
	}
	return p.d, nil
}

// element is a place in the document that means something to us.
type element int

const (
	other element = iota // and everything below it
	document
	root
	name
	uuid
	metadata
	ours
	oursKey
	devices
	vsock
	cid
	elements // how many there are
)

// places says which elements without a namespace are known below which.
var places = map[element]map[string]element{
	document: {"domain": root},
	root:     {"name": name, "uuid": uuid, "metadata": metadata, "devices": devices},
	devices:  {"vsock": vsock},
	vsock:    {"cid": cid},
}

// oursPlaces is the same for our own namespace; here what is not known is an error.
var oursPlaces = map[element]map[string]element{
	metadata: {"domain": ours},
	ours:     {"key": oursKey},
}

// repeats says which elements may stand there more than once.
var repeats = map[element]bool{other: true, oursKey: true}

type domainParser struct {
	dec   *xml.Decoder
	judge bool      // refuse what is wrong in our metadata
	stack []element // where we are; the first is the document
	seen  [elements]bool
	text  strings.Builder // of the name or UUID we are in
	d     Domain
}

func (p *domainParser) run() error {
	for {
		token, err := p.dec.Token()
		if errors.Is(err, io.EOF) {
			return p.finish()
		}
		if err != nil {
			return err
		}
		if err := p.token(token); err != nil {
			return err
		}
	}
}

func (p *domainParser) token(token xml.Token) error {
	switch t := token.(type) {
	case xml.StartElement:
		return p.start(t)
	case xml.EndElement:
		return p.end()
	case xml.CharData:
		return p.chars(t)
	case xml.Directive:
		return errors.New("a document type or other declaration is not allowed")
	}
	return nil // comments and processing instructions say nothing
}

func (p *domainParser) here() element { return p.stack[len(p.stack)-1] }

func (p *domainParser) start(t xml.StartElement) error {
	if len(p.stack) > maxDepth {
		return fmt.Errorf("more than %d elements deep", maxDepth)
	}
	at, err := p.place(t.Name)
	if err != nil {
		return err
	}
	if p.seen[at] && !repeats[at] {
		return fmt.Errorf("a second %s, where one is allowed", quote(t.Name.Local))
	}
	p.seen[at] = true
	p.stack = append(p.stack, at)
	p.text.Reset()
	return p.enter(at, t.Attr)
}

// place says what a new element means where we are.
func (p *domainParser) place(n xml.Name) (element, error) {
	here := p.here()
	if n.Space == Namespace {
		at := oursPlaces[here][n.Local]
		if at == other && p.judge {
			return other, fmt.Errorf("unknown element %s of namespace %s; it has <domain> in <metadata>, and <key name=\"...\"/> in that", quote(n.Local), Namespace)
		}
		return at, nil
	}
	at := other
	if n.Space == "" {
		at = places[here][n.Local]
	}
	switch {
	case here == document && at != root:
		return other, fmt.Errorf("want a <domain>, got %s", quote(n.Local))
	case here == name || here == uuid || here == cid:
		return other, fmt.Errorf("an element %s where none is allowed", quote(n.Local))
	case (here == ours || here == oursKey) && p.judge:
		return other, fmt.Errorf("a foreign element %s in our metadata", quote(n.Local))
	}
	return at, nil
}

func (p *domainParser) enter(at element, attrs []xml.Attr) error {
	switch at {
	case cid:
		return p.takeCID(attrs)
	case ours:
		p.d.Metadata = true
		return p.takeOurs(attrs)
	case oursKey:
		return p.takeKey(attrs)
	}
	return nil
}

func (p *domainParser) end() error {
	at, text := p.here(), p.text.String()
	p.stack = p.stack[:len(p.stack)-1]
	p.text.Reset()
	switch at {
	case name:
		p.d.Name = text
		return checkName(text)
	case uuid:
		var err error
		p.d.UUID, err = ParseUUID(strings.TrimSpace(text))
		return err
	}
	return nil
}

func (p *domainParser) chars(text xml.CharData) error {
	switch here := p.here(); {
	case here == name || here == uuid:
		if p.text.Len()+len(text) > maxText {
			return fmt.Errorf("a name or UUID of more than %d octets", maxText)
		}
		p.text.Write(text)
	case here == document && len(bytes.TrimSpace(text)) > 0:
		return errors.New("text outside the <domain>")
	case (here == ours || here == oursKey) && p.judge && len(bytes.TrimSpace(text)) > 0:
		return errors.New("text in our metadata, where only <key name=\"...\"/> is allowed")
	}
	return nil
}

// takeCID reads <cid auto='yes|no' address='N'/>. With auto='yes' there is no address until libvirt has picked one.
func (p *domainParser) takeCID(attrs []xml.Attr) error {
	address, auto := "", ""
	for _, a := range attrs {
		to := &address
		switch {
		case a.Name.Space != "":
			continue
		case a.Name.Local == "auto":
			to = &auto
		case a.Name.Local != "address":
			continue
		}
		if *to != "" {
			return fmt.Errorf("a second %s of one <cid>", quote(a.Name.Local))
		}
		*to = a.Value
	}
	if address == "" {
		return nil
	}
	n, err := strconv.ParseUint(address, 10, 32)
	if err != nil {
		return fmt.Errorf("reading the vsock address: %s is not a CID", quote(address))
	}
	p.d.CID = uint32(n)
	return checkCID(n)
}

func (p *domainParser) takeOurs(attrs []xml.Attr) error {
	tier, err := p.onlyAttr(attrs, "tier")
	if err != nil || !p.judge {
		return err
	}
	p.d.Tier = tier
	return checkTier(tier)
}

func (p *domainParser) takeKey(attrs []xml.Attr) error {
	key, err := p.onlyAttr(attrs, "name")
	if err != nil || !p.judge {
		return err
	}
	p.d.Offered = append(p.d.Offered, key)
	if len(p.d.Offered) > MaxOffered {
		return checkOffered(p.d.Offered)
	}
	return checkKeyName(key)
}

// onlyAttr returns the value of the one attribute that an element of ours may have, "" without it. Declarations of
// namespaces are none.
func (p *domainParser) onlyAttr(attrs []xml.Attr, want string) (string, error) {
	value, found := "", false
	for _, a := range attrs {
		if a.Name.Space == "xmlns" || a.Name.Space == "" && a.Name.Local == "xmlns" {
			continue
		}
		if p.judge && (found || a.Name.Space != "" || a.Name.Local != want) {
			return "", fmt.Errorf("unknown or repeated attribute %s in our metadata; only %s is known there", quote(a.Name.Local), want)
		}
		value, found = a.Value, true
	}
	return value, nil
}

func (p *domainParser) finish() error {
	switch {
	case !p.seen[root]:
		return errors.New("no <domain> in it")
	case !p.seen[name]:
		return errors.New("a domain without a name")
	case !p.seen[uuid]:
		return errors.New("a domain without a UUID")
	}
	return checkOffered(p.d.Offered)
}
